//! The objects of one connection, and the translation of their ids.
//!
//! The application and the host number objects differently, because some of the application's objects (shared-memory
//! pools) do not exist on the host and some of the host's (the pools that replace them) not in the application. The host
//! demands that ids are handed out without gaps. Ids the host gives out, from [`SERVER_IDS`], are the same on both sides.

use std::collections::HashMap;
use std::rc::Rc;

use super::error::{SessionError, code};
use super::shm::{Buffer, Pool};
use super::surface::Surface;
use super::table::{self, Table};
use super::wire::SERVER_IDS;

/// Objects one application may have at a time.
const MAX_OBJECTS: usize = 1 << 16;

/// What the proxy itself keeps about an object, besides its interface.
#[derive(Debug)]
pub enum State {
    /// Nothing: messages are only translated.
    Plain,
    /// `wl_display`.
    Display,
    /// `wl_registry`.
    Registry,
    /// `wl_shm`.
    Shm,
    /// `wl_shm_pool`; unknown to the host.
    Pool(Rc<Pool>),
    /// `wl_buffer` out of a pool.
    Buffer(Box<Buffer>),
    /// `wl_surface`.
    Surface(Box<Surface>),
    /// `wp_viewporter`.
    Viewporter,
}

impl State {
    /// The state a new object of this interface starts with.
    fn of(table: Table) -> Self {
        match table.name {
            "wl_display" => Self::Display,
            "wl_registry" => Self::Registry,
            "wl_shm" => Self::Shm,
            "wl_surface" => Self::Surface(Box::default()),
            "wp_viewporter" => Self::Viewporter,
            _ => Self::Plain,
        }
    }
}

/// One object of the application.
#[derive(Debug)]
pub struct Object {
    /// Its interface.
    pub table: Table,
    /// The version it was bound with.
    pub version: u32,
    /// Its id on the host; 0 if the host does not know it.
    pub host: u32,
    /// Destroyed by the application, but the host has not confirmed that yet.
    pub dead: bool,
    /// What the proxy keeps.
    pub state: State,
}

/// Both sides' objects.
#[derive(Debug)]
pub struct Objects {
    by_app: HashMap<u32, Object>,
    /// Host id to the application's id (0 if it has none) and the interface.
    by_host: HashMap<u32, (u32, Table)>,
    free: Vec<u32>,
    next: u32,
}

impl Objects {
    /// A fresh connection: only the display, object 1 on both sides.
    pub fn new() -> Self {
        let display = Object { table: table::display(), version: 1, host: 1, dead: false, state: State::Display };
        Self {
            by_app: HashMap::from([(1, display)]),
            by_host: HashMap::from([(1, (1, table::display()))]),
            free: Vec::new(),
            next: 2,
        }
    }

    /// A living object of the application.
    ///
    /// # Errors
    ///
    /// The application's fault if there is none.
    pub fn get(&mut self, id: u32) -> Result<&mut Object, SessionError> {
        self.by_app
            .get_mut(&id)
            .filter(|object| !object.dead)
            .ok_or_else(|| SessionError::application(1, code::INVALID_OBJECT, format!("invalid object {id}")))
    }

    /// The host's id of a living object.
    ///
    /// # Errors
    ///
    /// The application's fault if there is no such object on the host.
    pub fn host_id(&mut self, id: u32) -> Result<u32, SessionError> {
        match self.get(id)?.host {
            0 => Err(SessionError::application(1, code::INVALID_OBJECT, format!("object {id} cannot be used here"))),
            host => Ok(host),
        }
    }

    /// The application's id (0 if hidden from it) and interface of one of the host's objects.
    ///
    /// # Errors
    ///
    /// The host's fault if there is none.
    pub fn find_host(&self, host: u32) -> Result<(u32, Table), SessionError> {
        self.by_host.get(&host).copied().ok_or_else(|| SessionError::host(format!("no object {host}")))
    }

    fn check_new(&self, id: u32) -> Result<(), SessionError> {
        let invalid = |text| Err(SessionError::application(1, code::INVALID_OBJECT, text));
        if id == 0 || id >= SERVER_IDS || self.by_app.contains_key(&id) {
            return invalid(format!("invalid new id {id}"));
        }
        self.check_room()
    }

    fn check_room(&self) -> Result<(), SessionError> {
        if self.by_app.len() >= MAX_OBJECTS || self.by_host.len() >= MAX_OBJECTS {
            return Err(SessionError::application(1, code::NO_MEMORY, "too many objects"));
        }
        Ok(())
    }

    /// An id for an object the proxy creates on the host on its own account.
    ///
    /// # Errors
    ///
    /// Too many objects.
    pub fn create_hidden(&mut self, table: Table) -> Result<u32, SessionError> {
        self.check_room()?;
        let host = self.free.pop().unwrap_or_else(|| {
            let next = self.next;
            self.next = next.wrapping_add(1);
            next
        });
        self.by_host.insert(host, (0, table));
        Ok(host)
    }

    /// Registers what the application creates, and returns its id on the host.
    ///
    /// # Errors
    ///
    /// The application's fault: the id is taken, or it has too many objects.
    pub fn create(&mut self, id: u32, table: Table, version: u32) -> Result<u32, SessionError> {
        self.check_new(id)?;
        let host = self.create_hidden(table)?;
        self.by_host.insert(host, (id, table));
        self.by_app.insert(id, Object { table, version, host, dead: false, state: State::of(table) });
        Ok(host)
    }

    /// Registers what the application creates and the host never learns of.
    ///
    /// # Errors
    ///
    /// As [`Objects::create`].
    pub fn create_local(&mut self, id: u32, table: Table, version: u32, state: State) -> Result<(), SessionError> {
        self.check_new(id)?;
        self.by_app.insert(id, Object { table, version, host: 0, dead: false, state });
        Ok(())
    }

    /// Registers what the host creates.
    ///
    /// # Errors
    ///
    /// The host's fault: the id is not one it may give out.
    pub fn create_by_host(&mut self, id: u32, table: Table, version: u32) -> Result<(), SessionError> {
        if id < SERVER_IDS || self.by_app.get(&id).is_some_and(|object| !object.dead) {
            return Err(SessionError::host(format!("invalid new id {id}")));
        }
        self.check_room()?;
        self.by_host.insert(id, (id, table));
        self.by_app.insert(id, Object { table, version, host: id, dead: false, state: State::of(table) });
        Ok(())
    }

    /// The application is done with an object; events may still arrive for it until the host confirms.
    pub fn kill(&mut self, id: u32) {
        if let Some(object) = self.by_app.get_mut(&id) {
            object.dead = true;
            object.state = State::Plain;
        }
    }

    /// Forgets an object that exists only here.
    pub fn remove_local(&mut self, id: u32) {
        self.by_app.remove(&id);
    }

    /// Takes an object away from the application, while the host's half stays (hidden).
    pub fn detach(&mut self, id: u32) {
        if let Some(object) = self.by_app.remove(&id)
            && let Some(entry) = self.by_host.get_mut(&object.host)
        {
            entry.0 = 0;
        }
    }

    /// The host has freed an id. Returns the application's id for it, if it had one.
    ///
    /// # Errors
    ///
    /// The host's fault if the id was not in use.
    pub fn deleted_by_host(&mut self, host: u32) -> Result<Option<u32>, SessionError> {
        let entry = self.by_host.remove(&host).filter(|_| host != 1 && host < SERVER_IDS);
        let (app, _) = entry.ok_or_else(|| SessionError::host(format!("deleted the unknown id {host}")))?;
        self.free.push(host);
        if app == 0 {
            return Ok(None);
        }
        self.by_app.remove(&app);
        Ok(Some(app))
    }

    /// All objects of the application.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u32, &mut Object)> {
        self.by_app.iter_mut().map(|(id, object)| (*id, object))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seat() -> Table {
        table::global("wl_seat").unwrap()
    }

    #[test]
    fn host_ids_have_no_gaps_and_are_reused() {
        let mut objects = Objects::new();
        objects.create_local(2, table::shm_pool(), 1, State::Plain).unwrap();
        assert_eq!(objects.create(3, seat(), 1).unwrap(), 2);
        assert_eq!(objects.create_hidden(table::shm_pool()).unwrap(), 3);
        assert_eq!(objects.create(90, seat(), 1).unwrap(), 4);
        assert_eq!(objects.deleted_by_host(3).unwrap(), None, "the application never knew it");
        assert_eq!(objects.deleted_by_host(2).unwrap(), Some(3));
        assert_eq!(objects.create(3, seat(), 1).unwrap(), 2);
        assert_eq!(objects.create(5, seat(), 1).unwrap(), 3);
        assert_eq!(objects.create(6, seat(), 1).unwrap(), 5);
    }

    #[test]
    fn bad_ids_are_the_applications_fault() {
        let mut objects = Objects::new();
        objects.create(7, seat(), 1).unwrap();
        for id in [0, 1, 7, SERVER_IDS, u32::MAX] {
            let error = objects.create(id, seat(), 1).unwrap_err();
            assert!(matches!(error, SessionError::Application { code: code::INVALID_OBJECT, .. }), "{id}: {error}");
        }
        objects.kill(7);
        assert!(objects.get(7).is_err(), "destroyed");
        assert!(objects.create(7, seat(), 1).is_err(), "not before the host has confirmed");
        assert_eq!(objects.deleted_by_host(2).unwrap(), Some(7));
        objects.create(7, seat(), 1).unwrap();
    }

    #[test]
    fn bad_ids_of_the_host_are_its_fault() {
        let mut objects = Objects::new();
        assert!(objects.create_by_host(5, seat(), 1).is_err(), "not in the server's range");
        objects.create_by_host(SERVER_IDS, seat(), 1).unwrap();
        assert!(objects.create_by_host(SERVER_IDS, seat(), 1).is_err(), "in use");
        objects.kill(SERVER_IDS);
        objects.create_by_host(SERVER_IDS, seat(), 1).unwrap();
        for id in [0, 1, 99, SERVER_IDS] {
            assert!(objects.deleted_by_host(id).is_err(), "{id}");
        }
    }

    #[test]
    fn the_number_of_objects_is_bounded() {
        let mut objects = Objects::new();
        let error = (2..).find_map(|id| objects.create(id, seat(), 1).err()).unwrap();
        assert!(matches!(error, SessionError::Application { code: code::NO_MEMORY, .. }));
        assert!(objects.by_app.len() <= MAX_OBJECTS);
    }
}
