//! Applications in clones of a warm template, as `spectrum run` starts them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use tests::desktop::{Desktop, Owner};
use tests::place::Place;

/// The list of what an app touched, as soon as there is one.
fn wait_for_working_set(place: &Place) -> PathBuf {
    let folders = |path: &Path| fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let find = || {
        let all = folders(&place.home().join("warm")).flat_map(|warm| folders(&warm.join("apps")).collect::<Vec<_>>());
        all.map(|app| app.join("working-set.json")).find(|list| list.exists())
    };
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        if let Some(list) = find() {
            return list;
        }
        assert!(Instant::now() < deadline, "no list of what the app touched is written");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn zygote_says(place: &Place, text: &str) -> bool {
    place
        .folders("zygote-")
        .iter()
        .any(|zygote| fs::read_to_string(zygote.join("lock")).is_ok_and(|log| log.contains(text)))
}

fn named(name: &'static str) -> impl Fn(&Value) -> bool {
    move |window| window["name"] == name
}

/// The first application warms the template, the others are there at once; each is in a VM of its own, and nothing but the
/// zygote is left, which goes with the template.
#[test]
fn applications_are_clones_of_a_template_that_warms_itself() {
    let place = Place::new();
    let mut desktop = Desktop::new();
    let start = Instant::now();
    let foot = |title: &str| ["foot", "-T", title, "-o", "locked-title=yes", "cat"].map(String::from);
    let words = |words: &[String; 6]| words.clone().map(|word| Box::leak(word.into_boxed_str()) as &str);
    let mut first = place.start(Some(&desktop), &[], &words(&foot("first")));
    desktop.wait_for_window(&mut first, named("first"));
    let warmed = start.elapsed();
    assert!(first.said().contains("this template is not warm yet"), "{}", first.said());
    assert!(!first.said().contains("booting, since"), "{}", first.said());
    assert_eq!(place.folders("zygote-").len(), 1);

    let start = Instant::now();
    let mut second = place.start(Some(&desktop), &[], &words(&foot("second")));
    desktop.wait_for_window(&mut second, named("second"));
    println!("to the first window: {warmed:?}, warm: {:?}", start.elapsed());
    assert!(!second.said().contains("not warm yet") && !second.said().contains("booting"), "{}", second.said());

    // What the app touched while it started the next one has beforehand. It is a hint: a damaged list is no harm.
    let list = wait_for_working_set(&place);
    let mut third = place.start(Some(&desktop), &[], &words(&foot("third")));
    desktop.wait_for_window(&mut third, named("third"));
    drop(third);
    assert!(!zygote_says(&place, "nothing beforehand"));
    fs::write(list, "{}").unwrap();
    let mut fourth = place.start(Some(&desktop), &[], &words(&foot("fourth")));
    desktop.wait_for_window(&mut fourth, named("fourth"));
    drop(fourth);
    assert!(zygote_says(&place, "nothing beforehand"));

    // Each is another machine, has its streams and tells how it ended.
    let ask =
        "cat /etc/machine-id /proc/sys/kernel/random/boot_id; hostname; head -c 16 /dev/urandom | od -An -tx1; exit 7";
    let [one, two] = [(); 2].map(|()| {
        let (status, text) = place.start(Some(&desktop), &[], &["sh", "-c", ask]).wait();
        assert_eq!(status.code(), Some(7));
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    assert_eq!((one.len(), two.len()), (4, 4), "{one:?} {two:?}");
    for (a, b) in one.iter().zip(&two) {
        assert_eq!(a == b, a == "sh", "{one:?} {two:?}");
    }

    // One ends; the other does not notice.
    desktop.command("[title=\"first\"] kill");
    let (status, _) = first.wait();
    assert_ne!(status.code(), Some(125), "{status}");
    desktop.wait_for_window(&mut second, named("second"));
    drop(second);

    // Where a clone is impossible it boots, and says why.
    let mut booted = place.start(Some(&desktop), &["--vmm-arg=-v"], &["sleep", "1000"]);
    booted.hear_error("booting: a clone's VMM takes no --vmm-arg");
    drop(booted);

    assert_eq!(place.spectrum(&["template", "gc"]), "", "all of it is still good");
    place.spectrum(&["template", "rm", "default"]);
    assert!(place.folders("zygote-").is_empty());
    let mut left = fs::read_dir(place.home().join("warm")).unwrap().flatten().map(|entry| entry.path());
    assert!(left.all(|path| path.extension().is_some_and(|end| end == "lock")), "snapshots are left");
    // It ends when it has answered.
    let deadline = Instant::now() + Duration::from_secs(30);
    while !place.processes().is_empty() {
        assert!(Instant::now() < deadline, "{:?}", place.processes());
        std::thread::sleep(Duration::from_millis(50));
    }
}
