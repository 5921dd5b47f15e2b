//! Calls between the apps of two VMs, as in docs/split-ssh-agent.md: one has a key, the other may use it.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use tests::{desktop::Application, programs};

/// Where the user's files are, and the sockets of the VMs.
struct User {
    folder: tempfile::TempDir,
}

impl User {
    fn new() -> Self {
        let user = Self { folder: tempfile::Builder::new().prefix("user").tempdir().unwrap() };
        fs::create_dir_all(user.config("apps")).unwrap();
        user
    }

    fn config(&self, name: &str) -> PathBuf {
        self.folder.path().join(".config/spectrum").join(name)
    }

    fn policy(&self, text: &str) {
        fs::write(self.config("policy"), text).unwrap();
    }

    fn app(&self, name: &str, text: &str) {
        fs::write(self.config("apps").join(format!("{name}.toml")), text).unwrap();
    }

    fn start(&self, app: &str) -> Application {
        let place = self.folder.path();
        let settings: &[(&str, &Path)] = &[("HOME", place), ("XDG_RUNTIME_DIR", place)];
        Application::start_with(None, &["--boot"], settings, &[app])
    }

    fn log(&self) -> String {
        let mut command = Command::new(programs::program("spectrum"));
        let output = command.args(["policy", "log"]).env("HOME", self.folder.path()).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }
}

/// The files that the documentation shows, by their names.
fn documented(name: &str) -> &'static str {
    let text = include_str!("../../docs/split-ssh-agent.md");
    let begin = format!("```{name}\n");
    text.split(&begin).nth(1).and_then(|rest| rest.split("```").next()).unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn a_key_of_one_vm_is_used_in_another_if_the_policy_lets_it() {
    let user = User::new();
    // Shells instead of the applications, so that this test can see inside.
    let shell = |text: &str| text.replace("\"foot\"", "\"sh\"") + "\n";
    let more = "echo = [\"cat\"]\nstatus = [\"sh\", \"-c\", \"echo $SPECTRUM_CALLER; echo error >&2; exit 7\"]\n";
    user.app("vault", &("wayland = false\n".to_owned() + &shell(documented("toml vault.toml")) + more));
    user.app("work", &("wayland = false\n".to_owned() + &shell(documented("toml work.toml"))));
    user.policy("exec somebody vault:* allow\n");
    let (mut vault, mut work) = (user.start("vault"), user.start("work"));
    let key =
        "ssh-keygen -q -t ed25519 -N '' -C in-the-vault -f /tmp/key && ssh-add -q /tmp/key && rm /tmp/key /tmp/key.pub";
    assert_eq!(vault.shell(key), "");
    assert!(vault.shell("ssh-add -l").contains("in-the-vault"));

    // No rule fits.
    assert_eq!(work.shell("ssh-add -l > /tmp/list 2> /dev/null; echo $?; cat /tmp/list"), "1");
    work.hear_error("the policy denies it");
    let refused = "echo x | spectrum-guest call vault ssh-agent 2>&1; echo $?";
    assert_eq!(work.shell(refused), "spectrum-guest: the policy denies it\n125");

    user.policy(documented("policy"));
    let listed = work.shell("ssh-add -l 2>&1");
    assert!(listed.contains("in-the-vault (ED25519)"), "{listed}");
    // And it is used: what is signed here can be verified with the public part.
    let sign = "ssh-add -L > /tmp/key.pub; echo text > /tmp/text; ssh-keygen -q -Y sign -n test -f /tmp/key.pub /tmp/text 2> /dev/null; \
                (printf 'me '; cat /tmp/key.pub) > /tmp/signers; \
                ssh-keygen -Y verify -f /tmp/signers -I me -n test -s /tmp/text.sig < /tmp/text | cut -d ' ' -f 1";
    assert_eq!(work.shell(sign), "Good");
    assert_eq!(work.shell("find / -xdev -name 'key' 2> /dev/null"), "", "the key itself is not here");

    // Another service needs another rule.
    assert_eq!(work.shell("spectrum-guest call vault echo < /dev/null 2>&1"), "spectrum-guest: the policy denies it");
    user.policy("exec work vault:* allow\nexec work nobody:* allow\n");
    let call = |service: &str| format!("spectrum-guest call {service} < /dev/null 2>&1; echo $?");
    assert_eq!(work.shell(&call("vault other")), "spectrum-guest: vault offers no service other\n125");
    assert_eq!(work.shell(&call("nobody echo")), "spectrum-guest: nobody does not run\n125");
    assert_eq!(
        work.shell(&call("vault ../x")),
        "spectrum-guest: \"../x\" cannot be the name of an app or a service\n125"
    );
    let mut said: Vec<String> = work.shell(&call("vault status")).lines().map(str::to_owned).collect();
    said.sort();
    assert_eq!(said, ["7", "error", "work"]);
    let much = "head -c 3000000 /dev/urandom > /tmp/much; spectrum-guest call vault echo < /tmp/much | cmp - /tmp/much && echo same";
    assert_eq!(work.shell(much), "same");

    let log = user.log();
    let has = |parts: &[&str]| log.lines().any(|line| parts.iter().all(|part| line.contains(part)));
    assert!(has(&[" deny exec \"work\" \"vault:ssh-agent\"", "no rule of"]), "{log}");
    assert!(has(&[" allow exec \"work\" \"vault:ssh-agent\"", "/policy:2: exec work vault:ssh-agent allow"]), "{log}");

    vault.say("exit");
    assert!(vault.wait().0.success());
    assert_eq!(work.shell(&call("vault echo")), "spectrum-guest: vault does not run\n125");
    work.say("exit");
    assert!(work.wait().0.success());
}
