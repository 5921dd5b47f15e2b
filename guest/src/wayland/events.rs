//! From the host to the application: ids translated back, unknown globals hidden, descriptors made real.

use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, SealFlags};

use super::channel::{HostFd, KIND_BLOB, KIND_WRITE_PIPE};
use super::error::SessionError;
use super::gpu::Gpu;
use super::objects::State;
use super::session::Session;
use super::table::{self, op};
use super::wire::{self, Arg, Builder, Header};

/// The largest piece of memory (a keymap, say) the host may pass to an application.
const MAX_MEMORY: usize = 16 << 20;
/// Globals remembered; further ones stay hidden.
const MAX_GLOBALS: usize = 4096;

impl<G: Gpu> Session<G> {
    /// Deals with one event of the host.
    pub(super) fn event(&mut self, header: Header, message: &mut [u8]) -> Result<(), SessionError> {
        let (app, table) = self.objects.find_host(header.object)?;
        let desc = table.events.get(usize::from(header.opcode));
        let desc = desc.ok_or_else(|| SessionError::host(format!("no event {} of {}", header.opcode, table.name)))?;
        let mut args = std::mem::take(&mut self.args);
        let parsed = wire::parse(message, desc, &mut args).map_err(SessionError::event);
        let result = parsed.and_then(|()| match (table.name, header.opcode) {
            ("wl_display", op::DISPLAY_DELETE_ID) => self.delete_id(&args),
            ("wl_registry", op::REGISTRY_GLOBAL) if !self.global(message, &args) => Ok(()),
            ("wl_registry", op::REGISTRY_GLOBAL_REMOVE) if !self.known_global(&args) => Ok(()),
            _ => {
                if (table.name, header.opcode) == ("wl_buffer", op::BUFFER_RELEASE) {
                    self.released(app);
                }
                self.backward(app, header, message, &args, desc.child_interface)
            }
        });
        if result.is_ok() && desc.is_destructor && header.object >= wire::SERVER_IDS {
            self.objects.kill(app);
        }
        self.args = args;
        result
    }

    /// Translates an event and queues it.
    fn backward(
        &mut self,
        app: u32,
        header: Header,
        message: &mut [u8],
        args: &[Arg],
        child: Option<table::Table>,
    ) -> Result<(), SessionError> {
        let version = self.objects.get(app).map_or(1, |object| object.version);
        let fatal = (header.object, header.opcode) == (1, op::DISPLAY_ERROR);
        wire::set_word(message, 0, app);
        let mut fds = Vec::new();
        for arg in args {
            match *arg {
                Arg::Object { at, id } if id != 0 => {
                    let id = match self.objects.find_host(id) {
                        Ok((id, _)) if id != 0 || !fatal => id,
                        // An error of an object the application knows nothing of is the display's.
                        _ if fatal => 1,
                        other => other?.0,
                    };
                    wire::set_word(message, at, id);
                }
                Arg::NewId { id, .. } => {
                    let child = child.ok_or_else(|| SessionError::host("an object without an interface"))?;
                    self.objects.create_by_host(id, child, version)?;
                }
                Arg::Fd => {
                    let fd = self.host_fds.pop_front().ok_or_else(|| SessionError::host("a descriptor is missing"))?;
                    fds.push(self.realize(fd)?);
                }
                _ => {}
            }
        }
        if app != 0 {
            self.app.queue(message, fds);
        }
        Ok(())
    }

    fn delete_id(&mut self, args: &[Arg]) -> Result<(), SessionError> {
        let host = args.first().and_then(Arg::word).unwrap_or(0);
        if let Some(app) = self.objects.deleted_by_host(host)? {
            self.app.queue(&Builder::new(1, op::DISPLAY_DELETE_ID).word(app).finish(), []);
        }
        Ok(())
    }

    /// Whether the application may see this global; if so its version is lowered to what the proxy knows.
    fn global(&mut self, message: &mut [u8], args: &[Arg]) -> bool {
        let [Arg::Word { value: name }, Arg::Text { at, len }, Arg::Word { value: version }] = *args else {
            return false;
        };
        let text = message.get(at..at + len).and_then(|text| std::str::from_utf8(text).ok());
        let Some(table) = text.and_then(table::global) else { return false };
        if self.globals.len() >= MAX_GLOBALS || version == 0 {
            return false;
        }
        let version = version.min(table.version);
        // The version is the last word of the message.
        wire::set_word(message, message.len().saturating_sub(4), version);
        self.globals.insert(name, (table, version));
        true
    }

    fn known_global(&self, args: &[Arg]) -> bool {
        args.first().and_then(Arg::word).is_some_and(|name| self.globals.contains_key(&name))
    }

    fn released(&mut self, app: u32) {
        if let Ok(object) = self.objects.get(app)
            && let State::Buffer(buffer) = &mut object.state
        {
            buffer.busy = false;
        }
    }

    /// Makes a descriptor for the application out of one of the host's.
    fn realize(&mut self, fd: HostFd) -> Result<OwnedFd, SessionError> {
        match fd.kind {
            KIND_BLOB => self.copy_memory(fd),
            KIND_WRITE_PIPE => {
                if self.pipes.full() {
                    return Err(SessionError::host("too many transfers at once"));
                }
                self.pipes.add_source(fd.id).map_err(SessionError::io("making a pipe"))
            }
            kind => Err(SessionError::host(format!("a descriptor of the unsupported kind {kind}"))),
        }
    }

    /// A copy of the host's memory in a sealed file. What comes this way (keymaps) is small and does not change, and a file
    /// can be mapped in any way an application likes, which host memory cannot.
    fn copy_memory(&mut self, fd: HostFd) -> Result<OwnedFd, SessionError> {
        let what = "copying memory of the host";
        let size = usize::try_from(fd.size).ok().filter(|size| *size <= MAX_MEMORY);
        let size = size.ok_or_else(|| SessionError::host(format!("{} bytes of memory at once", fd.size)))?;
        let blob = self.channel.import(fd).map_err(SessionError::io(what))?;
        let mut bytes = vec![0; size];
        let read = blob.memory.read(0, &mut bytes);
        self.channel.destroy(blob);
        read.map_err(SessionError::io(what))?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = rustix::fs::memfd_create("wayland-host-memory", flags).map_err(SessionError::io(what))?;
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            let count = rustix::io::write(&file, rest).map_err(SessionError::io(what))?;
            rest = rest.get(count..).unwrap_or_default();
        }
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(SessionError::io(what))?;
        Ok(file)
    }
}
