//! Portals of a VM: this test plays the VMM, the guest with its bus, and the desktop with its portals.

use std::{
    collections::HashMap,
    io::copy,
    net::Shutdown,
    os::unix::fs::symlink,
    sync::{
        Arc,
        mpsc::{self, Receiver},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use guest_proto::portal::{self, Offer};
use vmm_api::Request as ApiRequest;
use zbus::{
    Message,
    blocking::{Connection, MessageIterator, connection::Builder, fdo::DBusProxy},
    message::Type,
    zvariant::{ObjectPath, OwnedValue, Value},
};

use super::{vms::*, *};

const TIME: Duration = Duration::from_secs(60);
const BACKEND: &str = "org.freedesktop.impl.portal.desktop.spectrum";
const DESKTOP: &str = "org.freedesktop.portal.Desktop";
const PATH: &str = "/org/freedesktop/portal/desktop";

type Dict = HashMap<String, OwnedValue>;

/// A bus of its own. It ends with this.
pub struct Bus {
    daemon: Child,
    address: String,
    socket: PathBuf,
}

impl Bus {
    fn start(fixture: &Fixture, name: &str) -> Self {
        let (socket, file) = (fixture.path(name), fixture.path(&format!("{name}.conf")));
        let address = format!("unix:path={}", socket.display());
        let rules = "<policy context='default'><allow send_destination='*' eavesdrop='true'/><allow eavesdrop='true'/><allow own='*'/></policy>";
        let text = format!(
            "<busconfig><type>session</type><listen>{address}</listen><auth>EXTERNAL</auth><auth>ANONYMOUS</auth>\
             <allow_anonymous/>{rules}</busconfig>"
        );
        fs::write(&file, text).unwrap();
        let mut daemon = Command::new("dbus-daemon")
            .args(["--nofork", "--nosyslog", "--print-address", "--config-file"])
            .arg(&file)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        BufReader::new(daemon.stdout.take().unwrap()).read_line(&mut String::new()).unwrap();
        Self { daemon, address, socket }
    }

    fn connect(&self) -> Connection {
        Builder::address(self.address.as_str()).unwrap().build().unwrap()
    }
}

impl Drop for Bus {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// The desktop's portals.
pub struct Desktop {
    connection: Connection,
    calls: Receiver<Message>,
}

impl Desktop {
    pub fn start(bus: &Bus) -> Self {
        let connection = bus.connect();
        let messages = MessageIterator::from(&connection);
        connection.request_name(DESKTOP).unwrap();
        let (sender, calls) = mpsc::channel();
        thread::spawn(move || {
            for message in messages.map_while(Result::ok).filter(|message| message.message_type() == Type::MethodCall) {
                let _ = sender.send(message);
            }
        });
        Self { connection, calls }
    }

    /// The next call, which must be of this method.
    fn called(&self, method: &str) -> Message {
        let call = self.calls.recv_timeout(TIME).unwrap();
        assert_eq!(call.header().member().unwrap(), method);
        call
    }

    /// The next request, of a window or of none: title and options. The dialog is open then.
    fn asked_by(&self, window: &str, method: &str) -> (String, Dict, Message) {
        let call = self.called(method);
        let (by, title, options): (String, String, Dict) = call.body().deserialize().unwrap();
        assert_eq!(by, window);
        self.connection.reply(&call.header(), &Self::handle(&call)).unwrap();
        (title, options, call)
    }

    /// The next request, of no window.
    pub fn asked(&self, method: &str) -> (String, Dict, Message) {
        self.asked_by("", method)
    }

    fn handle(call: &Message) -> ObjectPath<'static> {
        let sender = call.header().sender().unwrap().trim_start_matches(':').replace('.', "_");
        ObjectPath::try_from(format!("{PATH}/request/{sender}/spectrum")).unwrap()
    }

    /// What the user does in the dialog.
    pub fn answer(&self, call: &Message, response: u32, uris: &[String], choices: &[(&str, &str)]) {
        let results = HashMap::from([("uris", Value::from(uris)), ("choices", Value::from(choices))]);
        let interface = "org.freedesktop.portal.Request";
        let header = call.header();
        let body = (response, results);
        self.connection
            .emit_signal(header.sender().map(|name| name.as_str()), Self::handle(call), interface, "Response", &body)
            .unwrap();
    }
}

/// All of them, and an application that runs.
pub struct Stage {
    fixture: Arc<Fixture>,
    _guest: Bus,
    pub desktop_bus: Bus,
    client: Connection,
    pub api: Receiver<(ApiRequest, Vec<std::os::fd::OwnedFd>)>,
    launcher: Child,
    _agent: (Agent, Agent),
}

impl Drop for Stage {
    /// Told to end, the launcher ends its VMM.
    fn drop(&mut self) {
        let _ = Command::new("kill").arg(self.launcher.id().to_string()).status();
        let _ = self.launcher.wait();
    }
}

impl Stage {
    fn new(policy: &str) -> Self {
        Self::start(Arc::new(Fixture::new()), policy, None)
    }

    /// Starts the application, with a home directory that is kept if one is named.
    pub fn start(fixture: Arc<Fixture>, policy: &str, persist: Option<&str>) -> Self {
        fs::create_dir_all(fixture.path("config/spectrum")).unwrap();
        fs::write(fixture.path("config/spectrum/policy"), policy).unwrap();
        fs::create_dir_all(fixture.path("files")).unwrap();
        let (guest, desktop_bus) = (Bus::start(&fixture, "guest"), Bus::start(&fixture, "host"));
        let keep: Vec<String> = persist.iter().map(|name| format!("--persist={name}")).collect();
        let mut command = fixture.launcher(&["run", "--boot", "--no-wayland"]);
        command.args(keep).arg("app");
        command
            .env("DBUS_SESSION_BUS_ADDRESS", &desktop_bus.address)
            .env("XDG_CONFIG_HOME", fixture.path("config"))
            .env("XDG_STATE_HOME", fixture.path("state"));
        let launcher = command.stderr(Stdio::inherit()).spawn().unwrap();
        let arguments = fixture.vmm_arguments();
        let api = serve_api(&value_of(&arguments, "--api-socket"));
        let (listener, _, mut agent, ready) = Fixture::answer_wake_of(&arguments);
        send(&mut agent, &[FromAgent::Reply(Reply::Done)]);
        if persist.is_some() {
            let (request, mut agent) = connection(&listener);
            assert_eq!(request, Request::Home { user: "user".into(), source: "/host/.home".into() });
            send(&mut agent, &[FromAgent::Reply(Reply::Done)]);
        }
        let (_, mut application) = request_to_run(&listener);
        send(&mut application, &[started()]);
        let client = guest.connect();
        let came = MessageIterator::for_match_rule(
            format!("type='signal',member='NameOwnerChanged',arg0='{BACKEND}'").as_str(),
            &client,
            None,
        );
        let socket = arguments.iter().find_map(|argument| argument.strip_prefix("cid=3,socket=")).unwrap();
        Self::offer(&format!("{socket}_{}", portal::PORT));
        carry(&listener, &guest.socket);
        let mut came = came.unwrap();
        if !DBusProxy::new(&client).unwrap().name_has_owner(BACKEND.try_into().unwrap()).unwrap() {
            came.next().unwrap().unwrap();
        }
        Self { fixture, _guest: guest, desktop_bus, client, api, launcher, _agent: (application, ready) }
    }

    /// As the guest's part does it.
    fn offer(socket: &str) {
        let mut launcher = UnixStream::connect(socket).unwrap();
        launcher.set_read_timeout(Some(TIME)).unwrap();
        launcher.write_all(&Offer::versions()).unwrap();
        launcher.write_all(&Offer { port: 5002, root: "/host".into() }.encode()).unwrap();
        let mut answer = [0xff; 2];
        launcher.read_exact(&mut answer).unwrap();
        assert_eq!(answer, [portal::VERSION, 0]);
    }

    pub fn file(&self, name: &str) -> PathBuf {
        let path = self.fixture.path("files").join(name);
        fs::write(&path, "x").unwrap();
        path
    }

    /// Calls the back-end as the guest's xdg-desktop-portal does, for no window.
    pub fn ask(
        &self,
        method: &'static str,
        handle: &str,
        options: HashMap<&str, Value<'_>>,
    ) -> JoinHandle<(u32, Dict)> {
        self.ask_by("", method, handle, options)
    }

    fn ask_by(
        &self,
        window: &'static str,
        method: &'static str,
        handle: &str,
        options: HashMap<&str, Value<'_>>,
    ) -> JoinHandle<(u32, Dict)> {
        let options: Dict = options.into_iter().map(|(k, v)| (k.to_owned(), v.try_to_owned().unwrap())).collect();
        let (client, handle) =
            (self.client.clone(), ObjectPath::try_from(format!("{PATH}/request/{handle}")).unwrap().into_owned());
        thread::spawn(move || {
            let interface = Some("org.freedesktop.impl.portal.FileChooser");
            let body = (handle, "app.id", window, "Pick\u{202e}", options);
            client.call_method(Some(BACKEND), PATH, interface, method, &body).unwrap().body().deserialize().unwrap()
        })
    }

    /// The next grant: name, whether for writing.
    pub fn granted(&self) -> (String, bool) {
        let (ApiRequest::VmAddGrant(grant), fds) = self.api.recv_timeout(TIME).unwrap() else { panic!("no grant") };
        assert_eq!((grant.path, fds.len()), (None, 1));
        (grant.name, grant.writable)
    }

    fn call(
        &self,
        interface: &str,
        method: &str,
        body: &(impl serde::Serialize + zbus::zvariant::DynamicType),
    ) -> zbus::Result<Message> {
        self.client.call_method(Some(BACKEND), PATH, Some(interface), method, body)
    }
}

/// The VMM, for one connection into the guest.
fn carry(listener: &UnixListener, bus: &Path) {
    let (mut stream, _) = listener.accept().unwrap();
    let mut line = [0; 13];
    stream.read_exact(&mut line).unwrap();
    assert_eq!(&line, b"CONNECT 5002\n");
    stream.write_all(b"OK 1073741825\n").unwrap();
    let bus = UnixStream::connect(bus).unwrap();
    for (mut from, mut to) in [(stream.try_clone().unwrap(), bus.try_clone().unwrap()), (bus, stream)] {
        thread::spawn(move || {
            let _ = copy(&mut from, &mut to);
            let _ = to.shutdown(Shutdown::Both);
        });
    }
}

pub fn uri(path: &Path) -> String {
    format!("file://{}", path.display().to_string().replace(' ', "%20"))
}

pub fn strings(dict: &Dict, key: &str) -> Vec<String> {
    dict[key].try_clone().unwrap().try_into().unwrap()
}

#[test]
fn what_is_picked_is_granted_and_nothing_else() {
    let stage = Stage::new("files * * ask\n");
    let desktop = Desktop::start(&stage.desktop_bus);
    let [one, two] = ["a b.txt", "two"].map(|name| stage.file(name));

    // Only known options are passed on, and the title says whose dialog it is.
    let filter = ("Text".to_owned(), vec![(0_u32, "*.txt".to_owned()), (7, "x".to_owned())]);
    let options = HashMap::from([
        ("multiple", true.into()),
        ("surprise", true.into()),
        ("accept_label", "Take\n".into()),
        ("filters", Value::from(vec![filter])),
        ("current_folder", Value::from(b"/etc\0".to_vec())),
    ]);
    let asking = stage.ask("OpenFile", "a", options);
    let (title, options, call) = desktop.asked("OpenFile");
    assert_eq!(title, "[app] Pick");
    let mut names: Vec<&str> = options.keys().map(String::as_str).collect();
    names.sort_unstable();
    assert_eq!(names, ["accept_label", "choices", "filters", "handle_token", "multiple"]);
    assert_eq!(options["accept_label"], Value::from("Take").try_into().unwrap());
    desktop.answer(&call, 0, &[uri(&one), uri(&two)], &[("spectrum-write", "false"), ("own", "1")]);
    assert_eq!([stage.granted(), stage.granted()], [("a b.txt".into(), false), ("two".into(), false)]);
    let (response, results) = asking.join().unwrap();
    assert_eq!(response, 0);
    assert_eq!(strings(&results, "uris"), ["file:///host/a%20b.txt", "file:///host/two"]);
    let choices: Vec<(String, String)> = results["choices"].try_clone().unwrap().try_into().unwrap();
    assert_eq!(choices, [("own".to_owned(), "1".to_owned())]);

    // The same file again has its name; another that is called alike has another, and so has one for writing.
    fs::create_dir(stage.fixture.path("files/sub")).unwrap();
    let other = stage.file("sub/two");
    for (path, write, name) in [(&two, "false", None), (&other, "false", Some("two-2")), (&two, "true", Some("two-3"))]
    {
        let asking = stage.ask("OpenFile", "a", HashMap::new());
        let (_, _, call) = desktop.asked("OpenFile");
        desktop.answer(&call, 0, &[uri(path)], &[("spectrum-write", write)]);
        if let Some(name) = name {
            assert_eq!(stage.granted(), (name.to_owned(), write == "true"));
        }
        let uris = strings(&asking.join().unwrap().1, "uris");
        assert_eq!(uris, [format!("file:///host/{}", name.unwrap_or("two"))]);
    }

    // What is saved is made, for writing.
    let new = stage.fixture.path("files/new.txt");
    let asking = stage.ask("SaveFile", "a", HashMap::from([("current_name", "../x/new.txt".into())]));
    let (_, options, call) = desktop.asked("SaveFile");
    assert_eq!(options["current_name"], Value::from("new.txt").try_into().unwrap());
    assert!(!new.exists());
    desktop.answer(&call, 0, &[uri(&new)], &[]);
    assert_eq!(stage.granted(), ("new.txt".into(), true));
    assert_eq!(asking.join().unwrap().0, 0);
    assert_eq!(fs::read(&new).unwrap(), b"");
    let names = vec![b"a\0".to_vec(), b"../b\0".to_vec(), b"c".to_vec()];
    let asking = stage.ask("SaveFiles", "a", HashMap::from([("files", Value::from(names))]));
    let (_, options, call) = desktop.asked("SaveFiles");
    let files: Vec<Vec<u8>> = options["files"].try_clone().unwrap().try_into().unwrap();
    assert_eq!(files, [b"a\0".to_vec(), b"c\0".to_vec()]);
    desktop.answer(&call, 0, &["a", "c"].map(|name| uri(&stage.fixture.path("files").join(name))), &[]);
    assert_eq!([stage.granted(), stage.granted()], [("a".into(), true), ("c".into(), true)]);
    assert_eq!(asking.join().unwrap().0, 0);

    // Not what a link in place of a file leads to, and not what is no file.
    symlink("/etc/passwd", stage.fixture.path("files/link")).unwrap();
    for uri in
        [uri(&stage.fixture.path("files/link")), "file:///dev/null".into(), "http://x/".into(), "file:///".into()]
    {
        let asking = stage.ask("OpenFile", "a", HashMap::new());
        let (_, _, call) = desktop.asked("OpenFile");
        desktop.answer(&call, 0, std::slice::from_ref(&uri), &[]);
        assert_eq!(asking.join().unwrap().0, 2, "{uri}");
    }
    assert!(stage.api.try_recv().is_err());
}

#[test]
fn a_dialog_ends_when_the_user_the_application_or_the_desktop_ends_it() {
    let stage = Stage::new("files app /nowhere/* allow\n");
    let desktop = Desktop::start(&stage.desktop_bus);
    let asking = stage.ask("OpenFile", "a", HashMap::new());
    let (_, _, call) = desktop.asked("OpenFile");
    desktop.answer(&call, 1, &[], &[]);
    assert_eq!(asking.join().unwrap().0, 1);

    // The policy has the last word.
    let file = stage.file("file");
    let asking = stage.ask("OpenFile", "a", HashMap::new());
    let (_, _, call) = desktop.asked("OpenFile");
    desktop.answer(&call, 0, &[uri(&file)], &[]);
    assert_eq!(asking.join().unwrap().0, 2);

    // The application does not want it any more: the desktop sees its connection end.
    let watch = stage.desktop_bus.connect();
    let asking = stage.ask("OpenFile", "b", HashMap::new());
    let (_, _, call) = desktop.asked("OpenFile");
    let sender = call.header().sender().unwrap().to_string();
    let rule = format!("type='signal',member='NameOwnerChanged',arg0='{sender}'");
    let mut gone = MessageIterator::for_match_rule(rule.as_str(), &watch, None).unwrap();
    let request = format!("{PATH}/request/b");
    let interface = Some("org.freedesktop.impl.portal.Request");
    stage.client.call_method(Some(BACKEND), request.as_str(), interface, "Close", &()).unwrap();
    gone.next().unwrap().unwrap();
    assert_eq!(asking.join().unwrap().0, 2);

    // So many and no more; then the desktop's portal crashes.
    let asking: Vec<_> = (0..5).map(|n| stage.ask("SaveFile", &format!("n{n}"), HashMap::new())).collect();
    for _ in 0..4 {
        desktop.asked("SaveFile");
    }
    desktop.connection.close().unwrap();
    for one in asking {
        assert_eq!(one.join().unwrap().0, 2);
    }
    // Nobody is there, and later somebody is.
    assert_eq!(stage.ask("OpenFile", "a", HashMap::new()).join().unwrap().0, 2);
    let desktop = Desktop::start(&stage.desktop_bus);
    let asking = stage.ask("OpenFile", "a", HashMap::new());
    desktop.answer(&desktop.asked("OpenFile").2, 1, &[], &[]);
    assert_eq!(asking.join().unwrap().0, 1);
    assert!(stage.api.try_recv().is_err(), "nothing was granted");
}

#[test]
fn a_dialog_belongs_to_the_window_that_asked() {
    let stage = Stage::new("files * * ask\n");
    let desktop = Desktop::start(&stage.desktop_bus);
    let uuid = "wayland:0b3d6ff2-5f31-4d6c-8b6a-0f1d0c7f9a11";
    for (window, heard) in [(uuid, uuid), ("x11:3a00007", ""), ("wayland:\n", ""), ("nonsense", "")] {
        let asking = stage.ask_by(window, "OpenFile", "a", HashMap::new());
        let (_, _, call) = desktop.asked_by(heard, "OpenFile");
        desktop.answer(&call, 1, &[], &[]);
        assert_eq!(asking.join().unwrap().0, 1);
    }
}

#[test]
fn what_needs_no_file() {
    let stage =
        Stage::new("open-url app https://good.org/* allow\nopen-url app https://maybe.org/* ask\nnotify * * allow\n");
    let desktop = Desktop::start(&stage.desktop_bus);
    // Addresses.
    for refused in ["https://other.org/", "https://maybe.org/", "file:///etc/passwd", "x"] {
        assert!(stage.call(BACKEND, "OpenURI", &refused).is_err(), "{refused}");
    }
    let client = stage.client.clone();
    let opening = thread::spawn(move || {
        client.call_method(Some(BACKEND), PATH, Some(BACKEND), "OpenURI", &"https://good.org/a").map(drop)
    });
    let (uri, options, call) = desktop.asked("OpenURI");
    assert_eq!((uri.as_str(), options.len()), ("https://good.org/a", 1));
    desktop.answer(&call, 0, &[], &[]);
    opening.join().unwrap().unwrap();

    // Notifications, and what the user does with them.
    let notify = "org.freedesktop.impl.portal.Notification";
    let client = stage.client.clone();
    let notifying = thread::spawn(move || {
        let what =
            HashMap::from([("title", Value::from("Mail")), ("icon", "x".into()), ("default-action", "show".into())]);
        client.call_method(Some(BACKEND), PATH, Some(notify), "AddNotification", &("app.id", "1", what)).map(drop)
    });
    let call = desktop.called("AddNotification");
    let (id, what): (String, Dict) = call.body().deserialize().unwrap();
    assert_eq!((what.len(), &what["title"]), (2, &Value::from("[app] Mail").try_into().unwrap()));
    desktop.connection.reply(&call.header(), &()).unwrap();
    notifying.join().unwrap().unwrap();
    let rule = format!("type='signal',interface='{notify}'");
    let mut invoked = MessageIterator::for_match_rule(rule.as_str(), &stage.client, None).unwrap();
    let nothing: Vec<Value<'_>> = Vec::new();
    for id in ["1/app.id/1", &id] {
        let body = (id, "show", &nothing);
        let interface = "org.freedesktop.portal.Notification";
        desktop.connection.emit_signal(None::<&str>, PATH, interface, "ActionInvoked", &body).unwrap();
    }
    let signal = invoked.next().unwrap().unwrap();
    let (app, id, action, _): (String, String, String, Vec<OwnedValue>) = signal.body().deserialize().unwrap();
    assert_eq!((&*app, &*id, &*action), ("app.id", "1", "show"));

    // How the desktop looks, and no more about it.
    let settings = "org.freedesktop.impl.portal.Settings";
    let client = stage.client.clone();
    let reading = thread::spawn(move || {
        let reply = client.call_method(Some(BACKEND), PATH, Some(settings), "ReadAll", &Vec::<String>::new()).unwrap();
        reply.body().deserialize::<HashMap<String, Dict>>().unwrap()
    });
    let call = desktop.called("ReadAll");
    let asked: Vec<String> = call.body().deserialize().unwrap();
    assert_eq!(asked, ["org.freedesktop.appearance", "org.gnome.desktop.interface"]);
    let look = HashMap::from([("color-scheme", Value::from(1_u32)), ("secret", Value::from("x"))]);
    let all = HashMap::from([("org.freedesktop.appearance", look), ("org.gnome.desktop.privacy", HashMap::new())]);
    desktop.connection.reply(&call.header(), &all).unwrap();
    let read = reading.join().unwrap();
    assert_eq!((read.len(), read["org.freedesktop.appearance"].len()), (1, 1));
    assert_eq!(read["org.freedesktop.appearance"]["color-scheme"], OwnedValue::from(1_u32));
}

#[test]
fn notifications_are_limited_and_withdrawing_is_not() {
    let stage = Stage::new("notify * * allow\n");
    let desktop = Desktop::start(&stage.desktop_bus);
    let client = stage.client.clone();
    let began = Instant::now();
    let notifying = thread::spawn(move || {
        let notify = Some("org.freedesktop.impl.portal.Notification");
        let call =
            |method, body: &(&str, &str, Dict)| client.call_method(Some(BACKEND), PATH, notify, method, body).is_ok();
        let shown = (0..200).filter(|_| call("AddNotification", &("app.id", "1", Dict::new()))).count();
        for _ in 0..20 {
            client.call_method(Some(BACKEND), PATH, notify, "RemoveNotification", &("app.id", "1")).unwrap();
        }
        shown
    });
    let (mut added, mut removed) = (0, 0);
    while removed < 20 {
        let call = desktop.calls.recv_timeout(TIME).unwrap();
        match call.header().member().unwrap().as_str() {
            "AddNotification" => added += 1,
            "RemoveNotification" => removed += 1,
            other => panic!("{other}"),
        }
        desktop.connection.reply(&call.header(), &()).unwrap();
    }
    assert_eq!(notifying.join().unwrap() as u64, added);
    let most = 10 + began.elapsed().as_secs() / 2;
    assert!((10..=most).contains(&added), "{added}");
}

#[test]
fn a_guest_that_talks_nonsense_hurts_nobody() {
    let stage = Stage::new("files * * ask\n");
    let chooser = "org.freedesktop.impl.portal.FileChooser";
    assert!(stage.call(chooser, "OpenFile", &("not", "enough")).is_err());
    assert!(stage.call(chooser, "DeleteFile", &()).is_err());
    assert!(stage.call("org.example.Nothing", "OpenFile", &()).is_err());
    let handle = ObjectPath::try_from("/a").unwrap();
    let wrong = HashMap::from([("multiple", Value::from("yes"))]);
    assert!(stage.call(chooser, "OpenFile", &(handle, "", "", "", wrong)).is_err());
    // Larger than what is let through: the bus is left, and the VM runs on.
    let big = "x".repeat(1024 * 1024);
    assert!(stage.call(chooser, "OpenFile", &big.as_str()).is_err());
    let proxy = DBusProxy::new(&stage.client).unwrap();
    assert!(!proxy.name_has_owner(BACKEND.try_into().unwrap()).unwrap());
    assert_eq!(stage.fixture.names(), ["app-1"]);
}
