//! The API, with a real HTTP client.

use tests::curl::{Answer, ask};
use tests::{Vmm, VmmCommand, tiny};

/// A VMM with an API socket and no machine, and the JSON of a machine that counts on standard output.
fn vmm() -> (Vmm, String) {
    let mut vmm = VmmCommand::new().api().spawn();
    let kernel = vmm.path("kernel");
    tiny::write_counter(&kernel);
    let machine = serde_json::json!({
        "payload": {"kernel": kernel},
        "memory": {"size": 16 << 20},
        "serial": {"mode": "Tty"},
        "console": {"mode": "Off"},
    });
    vmm.wait_for_socket(&vmm.socket());
    (vmm, machine.to_string())
}

fn put(vmm: &Vmm, name: &str) -> u16 {
    let answer = ask(&vmm.socket(), "PUT", name, None);
    assert!(answer.status != 204 || answer.body.is_empty(), "{answer:?}");
    assert_ne!(answer.status, 0, "no answer; {}", vmm.log());
    answer.status
}

fn state(vmm: &Vmm) -> String {
    let answer = ask(&vmm.socket(), "GET", "vm.info", None);
    assert_eq!(answer.status, 200, "{answer:?}");
    answer.json()["state"].as_str().unwrap().to_owned()
}

/// The machine starts counting at 0: it was started anew.
fn starts(vmm: &mut Vmm) {
    vmm.wait_for("tick 00000000");
}

#[test]
fn a_machine_s_whole_life() {
    let (mut vmm, machine) = vmm();
    let ping = ask(&vmm.socket(), "GET", "vmm.ping", None);
    assert_eq!((ping.status, ping.json()["pid"].as_u64()), (200, Some(vmm.pid().into())), "{ping:?}");
    assert!(ping.json()["version"].as_str().unwrap().starts_with('v'), "{ping:?}");

    assert_eq!(ask(&vmm.socket(), "PUT", "vm.create", Some(&machine)).status, 204);
    assert_eq!(state(&vmm), "Created");
    assert_eq!(vmm.text(), "", "nothing runs yet");
    assert_eq!(put(&vmm, "vm.boot"), 204);
    starts(&mut vmm);
    assert_eq!(state(&vmm), "Running");
    assert_eq!((put(&vmm, "vm.pause"), state(&vmm).as_str()), (204, "Paused"));
    assert_eq!((put(&vmm, "vm.resume"), state(&vmm).as_str()), (204, "Running"));
    assert_eq!((put(&vmm, "vm.shutdown"), state(&vmm).as_str()), (204, "Created"));
    assert_eq!(put(&vmm, "vm.boot"), 204);
    starts(&mut vmm);
    assert_eq!(put(&vmm, "vm.reboot"), 204);
    starts(&mut vmm);
    assert_eq!((put(&vmm, "vm.pause"), put(&vmm, "vm.reboot"), state(&vmm).as_str()), (204, 204, "Running"));
    starts(&mut vmm);
    assert_eq!(put(&vmm, "vm.delete"), 204);
    assert_eq!(ask(&vmm.socket(), "GET", "vm.info", None).status, 404);
    assert_eq!(ask(&vmm.socket(), "PUT", "vm.create", Some(&machine)).status, 204);
    assert_eq!(put(&vmm, "vm.boot"), 204);
    starts(&mut vmm);

    let socket = vmm.socket();
    assert_eq!(put(&vmm, "vmm.shutdown"), 200);
    vmm.wait_here().assert_success();
    assert!(!socket.exists(), "the socket goes with its VMM");
}

/// What the guest does while it is paused is nothing: the next number it prints is the one after the last.
#[test]
fn pause_stops_the_guest_where_it_is() {
    let (mut vmm, machine) = vmm();
    assert_eq!(ask(&vmm.socket(), "PUT", "vm.create", Some(&machine)).status, 204);
    assert_eq!(put(&vmm, "vm.boot"), 204);
    vmm.wait_for("tick 00000010");
    assert_eq!(put(&vmm, "vm.pause"), 204);
    let paused = vmm.text();
    // Several round trips through the control thread, each long enough for many numbers.
    for _ in 0..3 {
        assert_eq!(state(&vmm), "Paused");
    }
    let later = vmm.text();
    // What was on its way through the pipe may still arrive, but no more than the line that was begun.
    assert!(later.lines().count() <= paused.lines().count() + 1, "{}", later.len() - paused.len());
    let last = later.rsplit_once('\n').unwrap().0.lines().next_back().and_then(tiny::tick).unwrap();
    assert_eq!(put(&vmm, "vm.resume"), 204);
    vmm.wait_for(&format!("tick {:08x}", last + 0x20));
    let text = vmm.text();
    let whole = text.rsplit_once('\n').unwrap().0;
    for (line, count) in whole.lines().zip(0..) {
        assert_eq!(line, format!("tick {count:08x}"), "none is missing and none comes twice");
    }
}

#[test]
fn requests_in_the_wrong_order_are_refused() {
    let (mut vmm, machine) = vmm();
    let refused = |vmm: &Vmm, method: &str, name: &str| {
        let answer = ask(&vmm.socket(), method, name, None);
        let lines = answer.json();
        (answer.status, lines.as_array().unwrap().last().unwrap().as_str().unwrap().to_owned())
    };
    let says = |status: u16, text: &str| (status, text.to_owned());
    assert_eq!(refused(&vmm, "GET", "vm.info"), says(404, "VM is not created"));
    assert_eq!(refused(&vmm, "PUT", "vm.boot"), says(404, "VM is not created"));
    for name in ["vm.pause", "vm.resume", "vm.shutdown", "vm.reboot", "vm.power-button"] {
        assert_eq!(refused(&vmm, "PUT", name), says(500, "VM is not running"), "{name}");
    }
    assert_eq!(put(&vmm, "vm.delete"), 204, "nothing to delete is not a mistake");

    assert_eq!(ask(&vmm.socket(), "PUT", "vm.create", Some(&machine)).status, 204);
    let again = ask(&vmm.socket(), "PUT", "vm.create", Some(&machine));
    assert_eq!((again.status, again.body.contains("VM is already created")), (500, true), "{again:?}");
    assert_eq!(refused(&vmm, "PUT", "vm.pause"), says(500, "VM is not running"));
    assert_eq!(put(&vmm, "vm.boot"), 204);
    starts(&mut vmm);
    assert_eq!(refused(&vmm, "PUT", "vm.boot"), says(500, "VM is already running"));
    assert_eq!(refused(&vmm, "PUT", "vm.resume"), says(500, "VM is not paused"));
    assert_eq!(put(&vmm, "vm.pause"), 204);
    assert_eq!(refused(&vmm, "PUT", "vm.pause"), says(500, "VM is already paused"));
    assert_eq!(put(&vmm, "vmm.shutdown"), 200);
    vmm.wait().assert_success();
}

#[test]
fn what_is_no_request_is_refused_and_harms_nothing() {
    let (vmm, _) = vmm();
    let status = |method: &str, name: &str, body: Option<&str>| ask(&vmm.socket(), method, name, body).status;
    assert_eq!(status("GET", "vm.nothing", None), 404);
    assert_eq!(status("GET", "vm.boot", None), 400);
    assert_eq!(status("PUT", "vm.create", None), 400);
    assert_eq!(status("PUT", "vm.create", Some("{")), 400);
    assert_eq!(status("PUT", "vm.resize", Some("{}")), 501);
    let impossible =
        ask(&vmm.socket(), "PUT", "vm.create", Some(r#"{"memory": {"size": 0}, "payload": {"kernel": "/k"}}"#));
    assert_eq!((impossible.status, impossible.body.contains("a machine needs memory")), (500, true), "{impossible:?}");
    assert_eq!(ask(&vmm.socket(), "GET", "vm.info", None).status, 404, "nothing was created");
    let Answer { status, .. } = ask(&vmm.socket(), "PUT", "vmm.shutdown", None);
    assert_eq!(status, 200);
    vmm.wait().assert_success();
}

/// A pseudo-terminal is there from `vm.create` on, so that nothing the guest says is missed.
#[test]
fn a_pseudo_terminal_s_path_is_known_before_the_boot() {
    let (vmm, machine) = vmm();
    let machine = machine.replace("\"Tty\"", "\"Pty\"");
    assert_eq!(ask(&vmm.socket(), "PUT", "vm.create", Some(&machine)).status, 204);
    let info = ask(&vmm.socket(), "GET", "vm.info", None).json();
    assert_eq!(info["state"], "Created");
    let path = info["config"]["serial"]["file"].as_str().unwrap().to_owned();
    let mut guest = tests::Output::collect(std::fs::File::open(&path).unwrap());
    assert_eq!(put(&vmm, "vm.boot"), 204);
    assert_eq!(guest.wait_for("tick", tests::TIMEOUT).unwrap(), "tick 00000000");
    assert_eq!(put(&vmm, "vmm.shutdown"), 200);
    vmm.wait().assert_success();
}
