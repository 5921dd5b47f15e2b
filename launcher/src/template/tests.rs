//! Tests of the template folder; the parts have their own.

use super::*;
use crate::progress::Bar;

fn template(home: &Home, name: &str) -> PathBuf {
    let folder = home.template(name).unwrap();
    fs::create_dir_all(&folder).unwrap();
    for file in FILES {
        fs::write(folder.join(file), file).unwrap();
    }
    Manifest::new("trixie", "6.12", [].into()).write(&folder, &FILES, &Bar::new()).unwrap();
    folder
}

#[test]
fn templates_are_listed_opened_and_removed() {
    let folder = tempfile::tempdir().unwrap();
    let home = Home::at(folder.path());
    assert!(names(&home).unwrap().is_empty());
    template(&home, "b");
    template(&home, "a");
    assert_eq!(names(&home).unwrap(), ["a", "b"]);
    assert_eq!(open(&home, "a").unwrap().manifest.kernel, "6.12");
    remove(&home, "a").unwrap();
    assert_eq!(names(&home).unwrap(), ["b"]);
    assert!(matches!(open(&home, "a"), Err(TemplateError::Unknown(_))));
    assert!(matches!(remove(&home, "a"), Err(TemplateError::Unknown(_))));
    assert!(matches!(remove(&home, ".."), Err(TemplateError::Home(_))));
}

#[test]
fn a_damaged_template_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let home = Home::at(folder.path());
    let path = template(&home, "a");
    fs::write(path.join(ROOT), "longer than it was").unwrap();
    let error = open(&home, "a").unwrap_err().to_string();
    assert!(error.contains("root.erofs has 18 bytes instead of 10"), "{error}");
    fs::remove_file(path.join(ROOT)).unwrap();
    assert!(matches!(open(&home, "a"), Err(TemplateError::Damaged { .. })));
}

#[test]
fn a_new_template_replaces_the_old_one() {
    let folder = tempfile::tempdir().unwrap();
    let home = Home::at(folder.path());
    let path = template(&home, "a");
    let work = work_folder(&home).unwrap();
    let made = work.path().join("template");
    fs::create_dir(&made).unwrap();
    fs::write(made.join("new"), "").unwrap();
    put_in_place(&made, &path, work.path()).unwrap();
    drop(work);
    assert!(path.join("new").exists() && !path.join(ROOT).exists());
    assert_eq!(fs::read_dir(home.templates()).unwrap().count(), 1);
}
