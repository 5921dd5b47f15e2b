//! Files that were picked for an app that keeps a home directory, from one of its VMs to the next.

use std::{collections::HashMap, os::unix::fs::symlink, sync::Arc};

use vmm_api::Request as ApiRequest;

use super::{
    portal::{Desktop, Stage, strings, uri},
    *,
};

const POLICY: &str = "files * * ask\n";

/// Picks a file in the dialog, and gives what the application is told it is called.
fn pick(stage: &Stage, desktop: &Desktop, path: &Path, write: bool) -> String {
    let asking = stage.ask("OpenFile", "a", HashMap::new());
    let (_, _, call) = desktop.asked("OpenFile");
    desktop.answer(&call, 0, &[uri(path)], &[("spectrum-write", if write { "true" } else { "false" })]);
    let (response, results) = asking.join().unwrap();
    assert_eq!(response, 0);
    strings(&results, "uris")[0].strip_prefix("file:///host/").unwrap().to_owned()
}

/// What the VM was granted until now, by name.
fn granted(stage: &Stage) -> Vec<(String, bool)> {
    let grants = stage.api.try_iter().map(|(request, fds)| match request {
        ApiRequest::VmAddGrant(grant) if fds.len() == 1 => (grant.name, grant.writable),
        other => panic!("{other:?}"),
    });
    grants.collect()
}

/// What is remembered: names, whether for writing.
fn remembered(fixture: &Fixture) -> Vec<(String, bool)> {
    let text = fs::read_to_string(fixture.path("home/homes/mine/picked.json")).unwrap();
    let contents: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(contents["version"], 1);
    let file = |file: &serde_json::Value| (file["name"].as_str().unwrap().to_owned(), file["writable"] == true);
    contents["files"].as_array().unwrap().iter().map(file).collect()
}

fn pairs(list: &[(&str, bool)]) -> Vec<(String, bool)> {
    list.iter().map(|(name, writable)| ((*name).to_owned(), *writable)).collect()
}

#[test]
fn what_was_picked_is_granted_to_the_next_vm_until_it_is_forgotten() {
    let fixture = Arc::new(Fixture::new());
    let stage = Stage::start(fixture.clone(), POLICY, Some("mine"));
    let desktop = Desktop::start(&stage.desktop_bus);
    let files = fixture.path("files");
    for folder in ["sub", "way"] {
        fs::create_dir(files.join(folder)).unwrap();
    }
    let [one, two] = ["one", "sub/one"].map(|name| stage.file(name));
    let [gone, link, way, secret] = ["gone", "link", "way/there", "secret"].map(|name| stage.file(name));
    assert_eq!(
        (pick(&stage, &desktop, &one, false), pick(&stage, &desktop, &two, true)),
        ("one".into(), "one-2".into())
    );
    for path in [&gone, &link, &way, &secret, &files.join("sub"), &one] {
        pick(&stage, &desktop, path, false);
    }
    let all = [
        ("one", false),
        ("one-2", true),
        ("gone", false),
        ("link", false),
        ("there", false),
        ("secret", false),
        ("sub", false),
    ];
    assert_eq!(granted(&stage), pairs(&[&[(".home", true)], &all[..]].concat()));
    assert_eq!(remembered(&fixture), pairs(&[&all[1..], &all[..1]].concat()), "the last one is at the end");
    drop(stage);

    // What is another thing now is not granted, and what is gone is forgotten.
    fs::remove_file(&gone).unwrap();
    fs::remove_file(&link).unwrap();
    symlink("/etc/passwd", &link).unwrap();
    fs::rename(files.join("way"), files.join("moved")).unwrap();
    symlink("moved", files.join("way")).unwrap();
    let policy = format!("files * {} deny\n{POLICY}", secret.display());
    let stage = Stage::start(fixture.clone(), &policy, Some("mine"));
    assert_eq!(granted(&stage), pairs(&[(".home", true), ("one-2", true), ("sub", false), ("one", false)]));
    let kept = [("one-2", true), ("link", false), ("there", false), ("secret", false), ("sub", false), ("one", false)];
    assert_eq!(remembered(&fixture), pairs(&kept));
    let log = fs::read_to_string(fixture.path("state/spectrum/policy.log")).unwrap();
    assert!(log.contains("the user has chosen it for a VM before)"), "{log}");
    // A name that is remembered is no other file's, and is the same file's again.
    let desktop = Desktop::start(&stage.desktop_bus);
    fs::create_dir(files.join("other")).unwrap();
    assert_eq!(pick(&stage, &desktop, &stage.file("other/secret"), false), "secret-2");
    fs::remove_file(&link).unwrap();
    assert_eq!(pick(&stage, &desktop, &stage.file("link"), false), "link");
    assert_eq!(granted(&stage), pairs(&[("secret-2", false), ("link", false)]));

    // Forgotten with the grant, and also when there is none.
    let done = (Some(0), String::new(), String::new());
    assert_eq!(fixture.output(&["revoke", "app-1", "one-2"]), done);
    assert!(matches!(stage.api.recv().unwrap().0, ApiRequest::VmRemoveGrant(grant) if grant.name == "one-2"));
    assert_eq!(fixture.output(&["revoke", "app-1", "there"]), done);
    let kept = [("secret", false), ("sub", false), ("one", false), ("secret-2", false), ("link", false)];
    assert_eq!(remembered(&fixture), pairs(&kept));

    // The commands about home directories leave one alone that a VM has.
    let homes: Vec<serde_json::Value> = serde_json::from_str(&fixture.output(&["home", "list", "--json"]).1).unwrap();
    assert_eq!((homes.len(), &homes[0]["name"], &homes[0]["vm"]), (1, &"mine".into(), &"app-1".into()));
    assert_eq!(homes[0]["remembered"][0]["path"], secret.display().to_string());
    for command in [&["home", "rm", "mine"][..], &["home", "forget", "mine"]] {
        let (status, _, said) = fixture.output(command);
        let expected = "spectrum: the home directory \"mine\" is in use by the VM app-1: end it first\n";
        assert_eq!((status, said.as_str()), (Some(125), expected));
    }
    drop(stage);
    assert_eq!(fixture.output(&["home", "list"]).1, "HOME  REMEMBERED  VM\nmine  5           -\n");
    assert_eq!(fixture.output(&["home", "forget", "mine", "sub"]), done);
    let (status, _, said) = fixture.output(&["home", "forget", "mine", "sub"]);
    assert!(status == Some(125) && said.contains("no file called \"sub\" is remembered"), "{said}");
    let stage = Stage::start(fixture.clone(), POLICY, Some("mine"));
    let names: Vec<_> = granted(&stage).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, [".home", "secret", "one", "secret-2", "link"]);
    drop(stage);
    assert_eq!(fixture.output(&["home", "forget", "mine"]), done);
    assert_eq!(remembered(&fixture), []);
    assert_eq!(fixture.output(&["home", "rm", "mine"]), done);
    assert_eq!(fs::read_dir(fixture.path("home/homes")).unwrap().count(), 0);
    assert_eq!(fixture.output(&["home", "list", "--json"]).1, "[]\n");
    assert!(one.exists() && two.exists(), "what was picked stays");
}

#[test]
fn all_that_is_remembered_is_granted_however_much_it_is() {
    // More than a VM can ask for in a second.
    let fixture = Arc::new(Fixture::new());
    fs::create_dir_all(fixture.path("home/homes/mine")).unwrap();
    fs::create_dir(fixture.path("files")).unwrap();
    let file = |number: usize| {
        let path = fixture.path("files").join(number.to_string());
        fs::write(&path, "").unwrap();
        serde_json::json!({ "name": number.to_string(), "path": path, "writable": false })
    };
    let files: Vec<_> = (0..100).map(file).collect();
    let contents = serde_json::json!({ "version": 1, "files": files });
    fs::write(fixture.path("home/homes/mine/picked.json"), contents.to_string()).unwrap();
    let stage = Stage::start(fixture, POLICY, Some("mine"));
    assert_eq!(granted(&stage).len(), 101);
}

#[test]
fn a_damaged_record_keeps_no_vm_from_starting() {
    let fixture = Arc::new(Fixture::new());
    fs::create_dir_all(fixture.path("home/homes/mine")).unwrap();
    fs::write(fixture.path("home/homes/mine/picked.json"), "{\"version\":1,\"files\":[{\"na").unwrap();
    let stage = Stage::start(fixture.clone(), POLICY, Some("mine"));
    assert_eq!(granted(&stage), pairs(&[(".home", true)]));
    assert!(fixture.path("home/homes/mine/picked.json.damaged").exists());
    pick(&stage, &Desktop::start(&stage.desktop_bus), &stage.file("one"), false);
    assert_eq!(remembered(&fixture), pairs(&[("one", false)]));
}

#[test]
fn a_vm_that_keeps_nothing_remembers_nothing() {
    let fixture = Arc::new(Fixture::new());
    let stage = Stage::start(fixture.clone(), POLICY, None);
    assert_eq!(pick(&stage, &Desktop::start(&stage.desktop_bus), &stage.file("one"), false), "one");
    drop(stage);
    assert!(!fixture.path("home/homes").exists());
    let stage = Stage::start(fixture, POLICY, None);
    assert_eq!(granted(&stage), []);
}
