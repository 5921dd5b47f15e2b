//! Real applications through the proxy to a real compositor: proxy, host renderer and sway, without a VM in between.

mod client;
mod desktop;
mod direct;

use std::process::Stdio;
use std::sync::{Mutex, MutexGuard};

use client::Client;
use desktop::{App, Desktop, run, spawn, wait_for};
use spectrum_guest::wayland;

/// One test at a time: they count this process' descriptors.
static ALONE: Mutex<()> = Mutex::new(());

/// A desktop with a proxy in front of it.
fn desktop() -> (Desktop, MutexGuard<'static, ()>) {
    let alone = ALONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let desktop = Desktop::start();
    let host = direct::Host::new(&desktop.socket());
    let listener = wayland::listen(&desktop.proxy_socket(), desktop.owner()).unwrap();
    let max_clients = wayland::Options::default().max_clients;
    std::thread::spawn(move || wayland::serve(&listener, max_clients, move || host.open()));
    (desktop, alone)
}

fn foot(desktop: &Desktop, script: &str) -> App {
    let before = desktop.windows("foot");
    let app = spawn(desktop.guest("foot").args(["--log-level=none", "sh", "-c", script]));
    wait_for("foot's window", || (desktop.windows("foot") > before).then_some(()));
    app
}

/// The share of pixels of this colour, in percent.
fn share(desktop: &Desktop, name: &str, colour: [u8; 3]) -> usize {
    let (width, height, pixels) = desktop.screenshot(name);
    pixels.chunks(3).filter(|pixel| *pixel == colour).count() * 100 / (width * height)
}

fn open_files() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

fn resident_mib() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: usize = statm.split(' ').nth(1).unwrap().parse().unwrap();
    (pages * 4096) >> 20
}

/// A megabyte that is no text and repeats nowhere at a page's distance.
fn megabyte() -> Vec<u8> {
    let mut state = 1u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state.to_le_bytes()[3]
    };
    std::iter::repeat_with(next).take(1 << 20).collect()
}

#[test]
fn a_terminal_shows_its_colours_and_takes_what_is_typed() {
    let (desktop, _alone) = desktop();
    let file = desktop.file("typed");
    // The colour comes after the first line, when the window has its final size.
    let script =
        format!("read go; printf '\\033[48;2;10;200;30m\\033[2J'; read line; echo \"$line\" > {}", file.display());
    let _foot = foot(&desktop, &script);
    desktop.type_line("");
    wait_for("the terminal's background", || (share(&desktop, "foot", [10, 200, 30]) > 60).then_some(()));
    desktop.type_line("hello from the host");
    let typed = wait_for("the typed line", || std::fs::read_to_string(&file).ok().filter(|text| text.ends_with('\n')));
    assert_eq!(typed, "hello from the host\n");
    wait_for("the window to close", || (desktop.windows("foot") == 0).then_some(()));
}

#[test]
fn scrolling_text_ends_up_as_it_would_without_the_proxy() {
    let (desktop, _alone) = desktop();
    let script = "read go; seq 1 3000; printf '\\033[?25l'; sleep 100";
    let shot = |app: App, name: &str| {
        desktop.type_line("");
        // Until two pictures in a row are the same.
        let mut last = Vec::new();
        let picture = wait_for("the text to settle", || {
            std::thread::sleep(std::time::Duration::from_millis(300));
            let now = desktop.screenshot(name).2;
            let same = now == last;
            last.clone_from(&now);
            same.then_some(now)
        });
        drop(app);
        wait_for("the window to close", || (desktop.windows("foot") == 0).then_some(()));
        picture
    };
    let proxied = shot(foot(&desktop, script), "scroll-proxied");
    let app = spawn(desktop.host("foot").args(["--log-level=none", "sh", "-c", script]));
    wait_for("foot's window", || (desktop.windows("foot") > 0).then_some(()));
    let direct = shot(app, "scroll-direct");
    let differing = proxied.chunks(3).zip(direct.chunks(3)).filter(|(left, right)| left != right).count();
    assert_eq!(differing, 0, "pixels differ");
}

#[test]
fn toolkits_draw_their_windows() {
    let (desktop, _alone) = desktop();
    let background = [0x20, 0x40, 0x60];
    for (program, id) in
        [("gtk3-demo", "gtk3-demo"), ("weston-terminal", "wayland-terminal"), ("weston-flower", "flower")]
    {
        assert_eq!(share(&desktop, "empty", background), 100);
        let app = spawn(desktop.guest(program).stderr(Stdio::null()));
        wait_for(program, || desktop.tree().contains(id).then_some(()));
        wait_for("its picture", || {
            let (_, _, pixels) = desktop.screenshot(program);
            let mut colours: Vec<_> = pixels.chunks(3).collect();
            colours.sort_unstable();
            colours.dedup();
            // Text and shadows make many shades; a blank or garbled window does not.
            (colours.len() > 60 && share(&desktop, program, background) < 98).then_some(())
        });
        drop(app);
        wait_for("an empty desktop", || (share(&desktop, "empty", background) == 100).then_some(()));
    }
}

#[test]
fn the_clipboard_and_the_primary_selection_cross_both_ways() {
    let (desktop, _alone) = desktop();
    selections_cross(&desktop, &["-t", "application/octet-stream"]);
    selections_cross(&desktop, &["-t", "application/octet-stream", "--primary"]);
}

fn selections_cross(desktop: &Desktop, options: &[&str]) {
    let copy = |mut command: std::process::Command, name: &str, data: &[u8]| {
        std::fs::write(desktop.file(name), data).unwrap();
        let source = std::fs::File::open(desktop.file(name)).unwrap();
        spawn(command.arg("--foreground").args(options).stdin(source))
    };
    let paste = |mut command: std::process::Command, expected: &[u8]| {
        command.arg("-n").args(options).stderr(Stdio::null());
        wait_for("the clipboard's contents", || (run(&mut command).stdout == expected).then_some(()));
    };
    for (round, data) in [b"host-secret-42".to_vec(), megabyte()].into_iter().enumerate() {
        let _copy = copy(desktop.host("wl-copy"), &format!("host-{round}"), &data);
        paste(desktop.guest("wl-paste"), &data);
        let reversed: Vec<u8> = data.iter().rev().copied().collect();
        let _copy = copy(desktop.guest("wl-copy"), &format!("guest-{round}"), &reversed);
        paste(desktop.host("wl-paste"), &reversed);
        // From one application of the VM to another.
        if data.len() < 4096 {
            paste(desktop.guest("wl-paste"), &reversed);
        }
    }
}

#[test]
fn fifty_applications_leave_nothing_behind() {
    let (desktop, _alone) = desktop();
    drop(foot(&desktop, "sleep 100"));
    wait_for("the first window to close", || (desktop.windows("foot") == 0).then_some(()));
    let (files, memory) = (open_files(), resident_mib());
    for _ in 0..5 {
        let apps: Vec<App> = (0..10).map(|_| foot(&desktop, "seq 1 200; sleep 100")).collect();
        assert_eq!(desktop.windows("foot"), 10);
        drop(apps);
        wait_for("all windows to close", || (desktop.windows("foot") == 0).then_some(()));
    }
    wait_for("all descriptors to be closed", || (open_files() <= files).then_some(()));
    assert!(resident_mib() < memory + 30, "grew from {memory} to {} MiB", resident_mib());
}

#[test]
fn two_hundred_resizes_leave_nothing_behind() {
    let (desktop, _alone) = desktop();
    let _foot = foot(&desktop, "seq 1 500; sleep 100");
    desktop.msg("[app_id=foot] floating enable");
    let resize = |step: u32| desktop.msg(&format!("[app_id=foot] resize set {} {}", 200 + step * 2, 150 + step * 2));
    (0..50).for_each(resize);
    let (files, memory) = (open_files(), resident_mib());
    for round in 0..4 {
        (0..50).for_each(|step| resize(if round % 2 == 0 { 50 - step } else { step }));
    }
    assert_eq!(desktop.windows("foot"), 1);
    wait_for("descriptors to be closed", || (open_files() <= files + 12).then_some(()));
    assert!(resident_mib() < memory + 48, "grew from {memory} to {} MiB", resident_mib());
}

#[test]
fn only_globals_that_can_work_are_announced() {
    let (desktop, _alone) = desktop();
    let globals = |command: &mut std::process::Command| {
        let text = String::from_utf8(run(command).stdout).unwrap();
        let names = text.lines().filter_map(|line| line.strip_prefix("interface: '")?.split('\'').next());
        names.map(str::to_owned).collect::<Vec<_>>()
    };
    let host = globals(&mut desktop.host("wayland-info"));
    let guest = globals(&mut desktop.guest("wayland-info"));
    for name in ["wl_compositor", "wl_shm", "wl_seat", "xdg_wm_base", "wp_viewporter", "zxdg_decoration_manager_v1"] {
        assert!(guest.iter().any(|known| known == name), "{name} is missing of {guest:?}");
    }
    for name in ["zwlr_screencopy_manager_v1", "zwp_virtual_keyboard_manager_v1", "zwlr_gamma_control_manager_v1"] {
        assert!(host.iter().any(|known| known == name), "the host lacks {name}: {host:?}");
        assert!(guest.iter().all(|known| known != name), "{name} is announced");
    }
}

#[test]
fn a_broken_application_falls_alone() {
    let (desktop, _alone) = desktop();
    let file = desktop.file("alive");
    let _foot = foot(&desktop, &format!("read line; echo \"$line\" > {}", file.display()));
    let files = open_files();
    let connect = || Client::connect(&desktop.proxy_socket());

    let (object, _, text) = connect().send(77, 0, &[]).error();
    assert_eq!((object, text.as_str()), (1, "invalid object 77"));
    let (_, code, _) = connect().send(1, 9, &[]).error();
    assert_eq!(code, 1, "invalid method");
    let (_, _, text) = connect().raw(&[1, 0, 0, 0, 0, 0, 3, 0]).error();
    assert!(text.contains("impossible size"), "{text}");
    connect().send(1, 1, &[2, 0]).error();

    let mut hidden = connect();
    let version = hidden.bind("wl_shm", 1000);
    assert_eq!(version, None, "a version nobody offered");

    let (object, code, _) = connect().shrinking_pool().error();
    assert_eq!((object, code), (client::BUFFER, 2), "wl_shm.error.invalid_fd");
    let (_, _, text) = connect().pool_without_descriptor().error();
    assert!(text.contains("descriptor"), "{text}");
    // Leaves in the middle of a message.
    drop(connect().raw(&[1, 0, 0, 0, 0]));

    // The terminal may have taken a buffer more meanwhile; ten connections left open would be sixty descriptors.
    wait_for("the broken connections' descriptors to be closed", || (open_files() <= files + 8).then_some(()));
    desktop.type_line("still here");
    let typed = wait_for("the typed line", || std::fs::read_to_string(&file).ok().filter(|text| text.ends_with('\n')));
    assert_eq!(typed, "still here\n");
}

#[test]
fn applications_end_with_the_compositor() {
    let (mut desktop, _alone) = desktop();
    let before = open_files();
    let mut foot = foot(&desktop, "sleep 100");
    // Until it has nothing more to say: a compositor that dies with unread requests resets the connection, which rutabaga by
    // itself (without the relay that stands before it in the product) does not survive.
    let mut last = desktop.screenshot("before").2;
    wait_for("the window to settle", || {
        let now = desktop.screenshot("before").2;
        (std::mem::replace(&mut last, now) == last).then_some(())
    });
    desktop.kill();
    wait_for("the application to end", || foot.0.try_wait().unwrap());
    wait_for("its descriptors to be closed", || (open_files() <= before).then_some(()));
    // A new application is told, instead of waiting for ever, unless it has not asked yet.
    let silent = Client::new(&desktop.proxy_socket());
    let (_, _, text) = Client::new(&desktop.proxy_socket()).send(1, 1, &[2]).error();
    assert!(text.contains("does not answer"), "{text}");
    assert!(silent.hears_nothing());
}
