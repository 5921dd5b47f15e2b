//! From the application to the host: ids translated, shared memory replaced, descriptors turned into what can cross.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use wayland_backend::protocol::MessageDesc;

use super::channel::{HostFd, KIND_BLOB};
use super::damage::{Rect, Region};
use super::error::{SessionError, code};
use super::gpu::Gpu;
use super::objects::State;
use super::session::Session;
use super::shm::{Blob, Buffer, Layout, Pool, size_class};
use super::table::{self, Table, op};
use super::wire::{self, Arg, Builder, Header};

/// How a request goes on after what is special about it was done.
enum Next {
    /// To the host, like any other.
    Forward,
    /// Nowhere: it was dealt with here.
    Done,
}

/// Which special treatment an object's requests get; the discriminant of its [`State`] without the contents.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    Registry,
    Shm,
    Pool,
    Buffer,
    Surface,
    Viewporter,
}

impl Kind {
    fn of(state: &State) -> Self {
        match state {
            State::Plain | State::Display => Self::Plain,
            State::Registry => Self::Registry,
            State::Shm => Self::Shm,
            State::Pool(_) => Self::Pool,
            State::Buffer(_) => Self::Buffer,
            State::Surface(_) => Self::Surface,
            State::Viewporter => Self::Viewporter,
        }
    }
}

/// The plain words among the arguments, in order, as a fixed number of them.
fn words<const N: usize>(args: &[Arg]) -> [u32; N] {
    let mut found = args.iter().filter_map(Arg::word);
    std::array::from_fn(|_| found.next().unwrap_or(0))
}

fn new_id(args: &[Arg]) -> u32 {
    args.iter().find_map(|arg| if let Arg::NewId { id, .. } = *arg { Some(id) } else { None }).unwrap_or(0)
}

impl<G: Gpu> Session<G> {
    /// Deals with one request of the application.
    pub(super) fn request(&mut self, header: Header, message: &mut [u8]) -> Result<(), SessionError> {
        let id = header.object;
        let object = self.objects.get(id)?;
        let (table, version, kind) = (object.table, object.version, Kind::of(&object.state));
        let desc = table.requests.get(usize::from(header.opcode)).filter(|desc| desc.since <= version);
        let desc = desc.ok_or_else(|| {
            let text = format!("invalid method {} of {}", header.opcode, table.name);
            SessionError::application(id, code::INVALID_METHOD, text)
        })?;
        let mut args = std::mem::take(&mut self.args);
        let result = wire::parse(message, desc, &mut args)
            .map_err(SessionError::request(id))
            .and_then(|()| self.special(kind, header, message, &args))
            .and_then(|next| match next {
                Next::Done => Ok(()),
                Next::Forward => self.forward(header, message, desc, &args),
            });
        self.args = args;
        result
    }

    fn special(&mut self, kind: Kind, header: Header, message: &[u8], args: &[Arg]) -> Result<Next, SessionError> {
        let id = header.object;
        match (kind, header.opcode) {
            (Kind::Registry, op::REGISTRY_BIND) => self.check_bind(id, message, args)?,
            (Kind::Shm, op::SHM_CREATE_POOL) => return self.create_pool(id, args),
            (Kind::Shm, op::SHM_RELEASE) => {
                // The host's half stays: buffers of its pools may still have to be made.
                self.objects.detach(id);
                return Ok(self.deleted(id));
            }
            (Kind::Pool, _) => return self.pool_request(header, args),
            (Kind::Buffer, op::BUFFER_DESTROY) => self.destroy_buffer(id)?,
            (Kind::Surface, _) => self.surface_request(header, args)?,
            (Kind::Viewporter, op::VIEWPORTER_GET_VIEWPORT) => {
                for arg in args {
                    if let Arg::Object { id, .. } = *arg
                        && let State::Surface(surface) = &mut self.objects.get(id)?.state
                    {
                        surface.viewport = true;
                    }
                }
            }
            _ => {
                // A buffer that is used other than by attaching it, for instance as a window's icon: all of it is needed now.
                for arg in args {
                    if let Arg::Object { id, .. } = *arg
                        && id != 0
                        && let State::Buffer(buffer) = &mut self.objects.get(id)?.state
                    {
                        buffer.stale = Region::everything();
                        buffer.busy = true;
                        buffer.copy(id)?;
                    }
                }
            }
        }
        Ok(Next::Forward)
    }

    /// Translates a request and sends it.
    fn forward(
        &mut self,
        header: Header,
        message: &mut [u8],
        desc: &'static MessageDesc,
        args: &[Arg],
    ) -> Result<(), SessionError> {
        let host = self.objects.host_id(header.object)?;
        let parent_version = self.objects.get(header.object)?.version;
        wire::set_word(message, 0, host);
        let mut fds = Vec::new();
        for arg in args {
            match *arg {
                Arg::Object { at, id } if id != 0 => wire::set_word(message, at, self.objects.host_id(id)?),
                Arg::NewId { at, id } => {
                    let (table, version) = match desc.child_interface {
                        Some(table) => (table, parent_version),
                        None => self.bound(args)?,
                    };
                    let host = self.objects.create(id, table, version)?;
                    wire::set_word(message, at, host);
                }
                Arg::Fd => {
                    let fd = self.take_fd(header.object)?;
                    fds.push(self.new_sink(fd)?);
                }
                _ => {}
            }
        }
        if desc.is_destructor {
            self.objects.kill(header.object);
        }
        self.tell_host(message, &fds)
    }

    fn take_fd(&mut self, id: u32) -> Result<OwnedFd, SessionError> {
        let missing = || SessionError::application(id, code::INVALID_METHOD, "a file descriptor is missing");
        self.app.fds.pop_front().ok_or_else(missing)
    }

    /// A descriptor the application wants data in (the only kind it may send besides shared memory).
    fn new_sink(&mut self, fd: OwnedFd) -> Result<HostFd, SessionError> {
        if self.pipes.full() {
            return Err(SessionError::application(1, code::NO_MEMORY, "too many transfers at once"));
        }
        let pipe = self.channel.new_read_pipe();
        self.pipes.add_sink(pipe.id, fd);
        Ok(pipe)
    }

    /// Confirms to the application that an id is free, in the host's place.
    fn deleted(&mut self, id: u32) -> Next {
        self.app.queue(&Builder::new(1, op::DISPLAY_DELETE_ID).word(id).finish(), []);
        Next::Done
    }

    /// The interface and version a `wl_registry.bind` names. Only globals that were announced can be bound.
    fn bound(&self, args: &[Arg]) -> Result<(Table, u32), SessionError> {
        let [name, version] = words(args);
        match self.globals.get(&name) {
            Some((table, max)) if (1..=*max).contains(&version) => Ok((table, version)),
            _ => {
                let text = format!("no global {name} of version {version}");
                Err(SessionError::application(1, code::INVALID_OBJECT, text))
            }
        }
    }

    fn check_bind(&self, id: u32, message: &[u8], args: &[Arg]) -> Result<(), SessionError> {
        let (table, _) = self.bound(args)?;
        let matches = args.iter().any(
            |arg| matches!(*arg, Arg::Text { at, len } if message.get(at..at + len) == Some(table.name.as_bytes())),
        );
        if !matches {
            let text = format!("the global is a {}", table.name);
            return Err(SessionError::application(id, code::INVALID_OBJECT, text));
        }
        Ok(())
    }

    fn create_pool(&mut self, id: u32, args: &[Arg]) -> Result<Next, SessionError> {
        let file = self.take_fd(id)?;
        let [size] = words(args);
        let shm = self.objects.host_id(id)?;
        let version = self.objects.get(id)?.version;
        let pool = Pool::new(file, size, shm, &mut self.pools)?;
        self.objects.create_local(new_id(args), table::shm_pool(), version, State::Pool(pool))?;
        Ok(Next::Done)
    }

    fn pool_request(&mut self, header: Header, args: &[Arg]) -> Result<Next, SessionError> {
        let id = header.object;
        let object = self.objects.get(id)?;
        let version = object.version;
        let State::Pool(pool) = &object.state else { return Ok(Next::Done) };
        let pool = Rc::clone(pool);
        match header.opcode {
            op::POOL_CREATE_BUFFER => self.create_buffer(id, &pool, version, args)?,
            op::POOL_RESIZE => pool.resize(id, words::<1>(args)[0])?,
            op::POOL_DESTROY => {
                self.objects.remove_local(id);
                return Ok(self.deleted(id));
            }
            _ => {}
        }
        Ok(Next::Done)
    }

    /// Gives a buffer its own piece of host memory, and the host a buffer in that.
    fn create_buffer(&mut self, id: u32, pool: &Rc<Pool>, version: u32, args: &[Arg]) -> Result<(), SessionError> {
        let fields: [u32; 5] = words(args);
        let [_, width, height, stride, format] = fields;
        let layout = Layout::new(pool, id, fields)?;
        let child = table::shm_pool().requests.first().and_then(|desc| desc.child_interface);
        let child = child.ok_or_else(|| SessionError::host("the table of wl_shm_pool is incomplete"))?;
        let too_large = || SessionError::application(1, code::NO_MEMORY, "a buffer is too large");
        let size = size_class(layout.bytes()).ok_or_else(too_large)?;
        self.store.reserve(size)?;
        let blob = match self.store.take(size) {
            Some(blob) => blob,
            None => self.new_blob(size, pool.shm)?,
        };
        let app_id = new_id(args);
        let host = self.objects.create(app_id, child, version)?;
        let message = Builder::new(blob.pool, op::POOL_CREATE_BUFFER)
            .word(host)
            .word(0)
            .word(width)
            .word(height)
            .word(stride)
            .word(format)
            .finish();
        self.serial += 1;
        let buffer = Buffer::new(Rc::clone(pool), layout, blob, self.serial);
        self.objects.get(app_id)?.state = State::Buffer(Box::new(buffer));
        self.tell_host(&message, &[])
    }

    /// Host memory of a size class, as a pool of the host's.
    fn new_blob(&mut self, size: usize, shm: u32) -> Result<Blob, SessionError> {
        let host = match self.channel.image(size) {
            Ok(host) => host,
            Err(_) => {
                // Perhaps what is kept for reuse is in the way.
                let spare = self.store.drain();
                self.destroy_blobs(spare)?;
                self.channel.image(size).map_err(|error| {
                    let text = format!("no host memory for a buffer of {size} bytes: {error}");
                    SessionError::application(1, code::NO_MEMORY, text)
                })?
            }
        };
        let pool = self.objects.create_hidden(table::shm_pool())?;
        let fd_size = u32::try_from(size).unwrap_or(u32::MAX);
        let fd = HostFd { kind: KIND_BLOB, id: host.resource, size: fd_size };
        let message = Builder::new(shm, op::SHM_CREATE_POOL).word(pool).word(fd_size).finish();
        self.tell_host(&message, &[fd])?;
        Ok(Blob { host, pool })
    }

    fn destroy_buffer(&mut self, id: u32) -> Result<(), SessionError> {
        let object = self.objects.get(id)?;
        if let State::Buffer(buffer) = std::mem::replace(&mut object.state, State::Plain) {
            let surplus = self.store.give_back(buffer.blob, !buffer.busy);
            self.destroy_blobs(surplus)?;
        }
        Ok(())
    }

    fn destroy_blobs(&mut self, blobs: Vec<Blob>) -> Result<(), SessionError> {
        if blobs.is_empty() {
            return Ok(());
        }
        for blob in &blobs {
            self.tell_host(&Builder::new(blob.pool, op::POOL_DESTROY).finish(), &[])?;
        }
        // Nothing that names the memory may be on its way when it is freed.
        self.flush_host()?;
        for blob in blobs {
            self.channel.destroy(blob.host);
        }
        Ok(())
    }

    fn surface_request(&mut self, header: Header, args: &[Arg]) -> Result<(), SessionError> {
        let id = header.object;
        let attached = match args.first() {
            Some(Arg::Object { id: 0, .. }) | None => None,
            Some(Arg::Object { id, .. }) => self.objects.buffer_key(*id),
            Some(_) => None,
        };
        let values: [u32; 4] = words(args);
        let signed = values.map(u32::cast_signed);
        let moved = signed.iter().take(2).any(|value| *value != 0);
        let object = self.objects.get(id)?;
        let destroyed = object.table.requests.get(usize::from(header.opcode)).is_some_and(|desc| desc.is_destructor);
        let State::Surface(surface) = &mut object.state else { return Ok(()) };
        match header.opcode {
            op::SURFACE_ATTACH => {
                surface.attach = Some(attached);
                surface.moved |= moved;
            }
            op::SURFACE_OFFSET => surface.moved |= moved,
            op::SURFACE_DAMAGE => {
                if let Some(rect) = Rect::new(signed, 1) {
                    surface.surface_damage.add(rect);
                }
            }
            op::SURFACE_DAMAGE_BUFFER => {
                if let Some(rect) = Rect::new(signed, 1) {
                    surface.damage.add(rect);
                }
            }
            op::SURFACE_SET_BUFFER_TRANSFORM => surface.transform = values[0],
            op::SURFACE_SET_BUFFER_SCALE => surface.scale = values[0],
            op::SURFACE_COMMIT => self.objects.commit(id)?,
            _ if destroyed => self.objects.forget_surface(id),
            _ => {}
        }
        Ok(())
    }
}
