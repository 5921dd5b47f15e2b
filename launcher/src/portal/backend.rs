//! The back-end of a guest's xdg-desktop-portal, on the guest's own bus.

use std::{
    collections::HashMap,
    os::unix::net::UnixStream,
    sync::{Arc, Mutex, PoisonError},
    thread,
};

use serde::Serialize;
use zbus::{
    AuthMechanism, Message,
    blocking::{Connection, MessageIterator, connection::Builder},
    message::Type,
    names::ErrorName,
    zvariant::{DynamicType, ObjectPath, OwnedObjectPath, OwnedValue},
};

use super::{
    Portals,
    chooser::{self, Method, Options, Results},
    desktop::{Desktop, DesktopError},
    notify::{self, Notification, NotifyError},
    open,
    settings::{self, Settings},
};

/// What the guest's xdg-desktop-portal calls.
const NAME: &str = "org.freedesktop.impl.portal.desktop.spectrum";

/// The object that it calls, and whose signals it hears.
const PATH: &str = "/org/freedesktop/portal/desktop";

/// Interfaces that are not a portal's.
const REQUEST: &str = "org.freedesktop.impl.portal.Request";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// Dialogs of one VM that can be open at once.
const DIALOGS: usize = 4;

/// How a request ended, for the guest (the portals' documentation, "response").
const DONE: u32 = 0;
const CANCELLED: u32 = 1;
const FAILED: u32 = 2;

const UNKNOWN_METHOD: &str = "org.freedesktop.DBus.Error.UnknownMethod";
const INVALID_ARGUMENTS: &str = "org.freedesktop.DBus.Error.InvalidArgs";
const FAILURE: &str = "org.freedesktop.DBus.Error.Failed";
const NOT_FOUND: &str = "org.freedesktop.portal.Error.NotFound";

/// The guest's bus while it is served.
struct Backend {
    portals: Arc<Portals>,
    bus: Connection,
    /// Where the guest sees what it is granted.
    root: String,
    /// What is being asked, by the guest's name for the request.
    dialogs: Mutex<HashMap<OwnedObjectPath, Desktop>>,
    /// What has no dialog is asked by this, once there is something.
    desktop: Mutex<Option<Desktop>>,
}

/// Joins the bus behind `stream` and answers calls until it ends.
pub fn serve(portals: &Arc<Portals>, stream: UnixStream, root: &str) -> zbus::Result<()> {
    let bus = Builder::async_io_unix_stream(stream).auth_mechanism(AuthMechanism::Anonymous).build()?;
    // Before there can be a call.
    let messages = MessageIterator::from(&bus);
    bus.request_name(NAME)?;
    let root = root.trim_end_matches('/').to_owned();
    let backend =
        Arc::new(Backend { portals: portals.clone(), bus, root, dialogs: Mutex::default(), desktop: Mutex::default() });
    let served = backend.serve(messages);
    // Nobody is there to be answered.
    let desktop = backend.desktop.lock().unwrap_or_else(PoisonError::into_inner).take();
    let mut dialogs = backend.dialogs.lock().unwrap_or_else(PoisonError::into_inner);
    desktop.into_iter().chain(dialogs.drain().map(|(_, desktop)| desktop)).for_each(Desktop::withdraw);
    served
}

impl Backend {
    fn serve(self: &Arc<Self>, messages: MessageIterator) -> zbus::Result<()> {
        for message in messages {
            let message = match message {
                Ok(message) => message,
                // The VM ended, or what it is the guest's business to end.
                Err(zbus::Error::InputOutput(_)) => break,
                Err(error) => return Err(error),
            };
            if message.message_type() == Type::MethodCall {
                self.clone().answer(&message)?;
            }
        }
        Ok(())
    }

    /// Answers a call, or lets a thread do so. An error is one of the bus.
    fn answer(self: Arc<Self>, call: &Message) -> zbus::Result<()> {
        let header = call.header();
        let interface = header.interface().map(|name| name.as_str());
        let member = header.member().map_or("", |name| name.as_str());
        match (interface, member) {
            (Some(chooser::INTERFACE), member) => match Method::named(member) {
                Some(method) => self.choose(call, method),
                None => self.refuse(call, UNKNOWN_METHOD, "no such method"),
            },
            (Some(REQUEST), "Close") => {
                if let Some(path) = header.path() {
                    self.withdraw(path);
                }
                self.reply(call, &())
            }
            (Some(settings::INTERFACE), "ReadAll") => self.read_settings(call),
            (Some(settings::INTERFACE), "Read") => self.read_setting(call),
            (Some(notify::INTERFACE), "AddNotification") => self.notify(call),
            (Some(notify::INTERFACE), "RemoveNotification") => self.denotify(call),
            (Some(open::INTERFACE), "OpenURI") => self.open(call),
            (Some(PROPERTIES), "GetAll") => self.reply(call, &HashMap::from([("version", OwnedValue::from(1_u32))])),
            _ => self.refuse(call, UNKNOWN_METHOD, "no such method"),
        }
    }

    fn reply(&self, call: &Message, body: &(impl Serialize + DynamicType)) -> zbus::Result<()> {
        self.bus.reply(&call.header(), body)
    }

    fn refuse(&self, call: &Message, error: &'static str, message: &str) -> zbus::Result<()> {
        self.bus.reply_error(&call.header(), ErrorName::from_static_str_unchecked(error), &message)
    }

    fn withdraw(&self, request: &ObjectPath<'_>) {
        let mut dialogs = self.dialogs.lock().unwrap_or_else(PoisonError::into_inner);
        let request = OwnedObjectPath::from(request.to_owned());
        if let Some(desktop) = dialogs.remove(&request) {
            desktop.withdraw();
        }
    }

    /// Asks the user, which takes time.
    fn choose(self: Arc<Self>, call: &Message, method: Method) -> zbus::Result<()> {
        type Arguments = (OwnedObjectPath, String, String, String, Options);
        let (handle, _, window, title, options) = match call.body().deserialize::<Arguments>() {
            Ok(arguments) => arguments,
            Err(error) => return self.refuse(call, INVALID_ARGUMENTS, &error.to_string()),
        };
        let app = self.portals.app();
        let desktop = match self.begin(&handle) {
            Ok(desktop) => desktop,
            Err(why) => {
                log::warn!("{app}: no dialog: {why}");
                return self.reply(call, &(FAILED, Results::default()));
            }
        };
        let call = call.clone();
        let backend = self.clone();
        let started = thread::Builder::new().name("dialog".into()).spawn(move || {
            let asked = (&*window, &*title);
            let result = chooser::choose(&backend.portals, &desktop, &backend.root, method, asked, options);
            backend.withdraw(&handle);
            let reply = match result {
                Ok(Some(results)) => (DONE, results),
                Ok(None) => (CANCELLED, Results::default()),
                Err(error) => {
                    log::warn!("{}: no file: {error}", backend.portals.app());
                    (FAILED, Results::default())
                }
            };
            // It may be gone, and so has nothing to be told.
            let _ = backend.reply(&call, &reply);
        });
        started.map(drop).map_err(|error| {
            log::warn!("{app}: no dialog: {error}");
            error.into()
        })
    }

    /// Makes a connection for one dialog, if there can be one more.
    fn begin(&self, handle: &OwnedObjectPath) -> Result<Desktop, String> {
        let mut dialogs = self.dialogs.lock().unwrap_or_else(PoisonError::into_inner);
        if dialogs.len() >= DIALOGS || dialogs.contains_key(handle) {
            return Err(format!("{} are open", dialogs.len()));
        }
        let desktop = Desktop::connect().map_err(|error| error.to_string())?;
        dialogs.insert(handle.clone(), desktop.clone());
        Ok(desktop)
    }

    /// The connection for what has no dialog. The guest hears from it what changes.
    fn desktop(self: &Arc<Self>) -> Result<Desktop, DesktopError> {
        let mut desktop = self.desktop.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(desktop) = &*desktop {
            return Ok(desktop.clone());
        }
        let new = Desktop::connect()?;
        let (watched, backend) = (new.clone(), self.clone());
        let started = thread::Builder::new().name("desktop".into()).spawn(move || {
            if let Err(error) = watched.watch(|signal| backend.pass_on(signal)) {
                log::debug!("{}: no signals of the desktop any more: {error}", backend.portals.app());
            }
        });
        started.map_err(zbus::Error::from)?;
        Ok(desktop.insert(new).clone())
    }

    /// Tells the guest of what happened on the desktop, if it may know.
    fn pass_on(&self, signal: &Message) {
        let header = signal.header();
        let interface = header.interface().map_or("", |name| name.as_str());
        let member = header.member().map_or("", |name| name.as_str());
        let body = signal.body();
        let sent = match (interface, member) {
            (settings::DESKTOP, "SettingChanged") => {
                body.deserialize::<(String, String, OwnedValue)>().and_then(|body| {
                    if !settings::is_known(&body.0, &body.1) {
                        return Ok(());
                    }
                    self.emit(settings::INTERFACE, member, &body)
                })
            }
            (notify::DESKTOP, "ActionInvoked") => {
                body.deserialize::<(String, String, Vec<OwnedValue>)>().and_then(|(id, action, parameter)| {
                    let Some((app_id, id)) = notify::ids_for_guest(&id) else { return Ok(()) };
                    self.emit(notify::INTERFACE, member, &(app_id, id, action, parameter))
                })
            }
            _ => Ok(()),
        };
        if let Err(error) = sent {
            log::debug!("{}: {member} is not passed on: {error}", self.portals.app());
        }
    }

    fn emit(&self, interface: &str, member: &str, body: &(impl Serialize + DynamicType)) -> zbus::Result<()> {
        self.bus.emit_signal(None::<&str>, PATH, interface, member, body)
    }

    fn read_settings(self: Arc<Self>, call: &Message) -> zbus::Result<()> {
        let wanted: Vec<String> = match call.body().deserialize() {
            Ok(wanted) => wanted,
            Err(error) => return self.refuse(call, INVALID_ARGUMENTS, &error.to_string()),
        };
        self.reply(call, &self.settings(&wanted))
    }

    fn read_setting(self: Arc<Self>, call: &Message) -> zbus::Result<()> {
        let (namespace, key): (String, String) = match call.body().deserialize() {
            Ok(arguments) => arguments,
            Err(error) => return self.refuse(call, INVALID_ARGUMENTS, &error.to_string()),
        };
        let mut all = self.settings(std::slice::from_ref(&namespace));
        match all.get_mut(&namespace).and_then(|values| values.remove(&key)) {
            Some(value) => self.reply(call, &value),
            None => self.refuse(call, NOT_FOUND, "no such setting"),
        }
    }

    /// None where the desktop has none: applications then look as they do by themselves.
    fn settings(self: &Arc<Self>, wanted: &[String]) -> Settings {
        let read = self.desktop().and_then(|desktop| settings::read_all(&desktop, wanted));
        read.unwrap_or_else(|error| {
            log::info!("{}: no settings: {error}", self.portals.app());
            Settings::new()
        })
    }

    fn notify(self: Arc<Self>, call: &Message) -> zbus::Result<()> {
        let (app_id, id, notification) = match call.body().deserialize::<(String, String, Notification)>() {
            Ok(arguments) => arguments,
            Err(error) => return self.refuse(call, INVALID_ARGUMENTS, &error.to_string()),
        };
        // Before there is anything that is written down: who sends many shall not fill logs either.
        if let Err(error) = self.portals.notifications.admit(self.portals.app()) {
            return self.refuse(call, FAILURE, &error.to_string());
        }
        let desktop = self.desktop().map_err(NotifyError::from);
        let done = desktop.and_then(|desktop| notify::add(&self.portals, &desktop, (&app_id, &id), notification));
        self.done(call, done)
    }

    fn denotify(self: Arc<Self>, call: &Message) -> zbus::Result<()> {
        let (app_id, id): (String, String) = match call.body().deserialize() {
            Ok(arguments) => arguments,
            Err(error) => return self.refuse(call, INVALID_ARGUMENTS, &error.to_string()),
        };
        let desktop = self.desktop().map_err(NotifyError::from);
        self.done(call, desktop.and_then(|desktop| notify::remove(&desktop, (&app_id, &id))))
    }

    /// Answers a call that has no results.
    fn done<E: std::error::Error>(&self, call: &Message, done: Result<(), E>) -> zbus::Result<()> {
        match done {
            Ok(()) => self.reply(call, &()),
            Err(error) => {
                log::warn!("{}: {error}", self.portals.app());
                self.refuse(call, FAILURE, &error.to_string())
            }
        }
    }

    /// Opens an address, for which the user may be asked with what.
    fn open(self: Arc<Self>, call: &Message) -> zbus::Result<()> {
        let uri: String = match call.body().deserialize() {
            Ok(uri) => uri,
            Err(error) => return self.refuse(call, INVALID_ARGUMENTS, &error.to_string()),
        };
        let number = call.primary_header().serial_num();
        let handle = OwnedObjectPath::try_from(format!("{PATH}/open/{number}"))?;
        let desktop = match self.begin(&handle) {
            Ok(desktop) => desktop,
            Err(why) => return self.refuse(call, FAILURE, &why),
        };
        let (call, backend) = (call.clone(), self.clone());
        let started = thread::Builder::new().name("dialog".into()).spawn(move || {
            let opened = open::open(&backend.portals, &desktop, &uri);
            backend.withdraw(&handle);
            // The bus may be gone, and so has nothing to be told.
            let _ = backend.done(&call, opened);
        });
        Ok(started.map(drop)?)
    }
}
