//! [`Gpu`] on the kernel's virtio-gpu driver: the DRM ioctls of `include/uapi/drm/virtgpu_drm.h`.
//!
//! One open of the render node is one context on the host, and closing it ends the context with everything in it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::gpu::{Gpu, HostBlob, Mapping, RING_SIZE, Ring};

/// Number of the cross-domain capability set (virtio-gpu, `VIRTIO_GPU_CAPSET_CROSS_DOMAIN`).
const CAPSET_CROSS_DOMAIN: u64 = 5;
/// How long the host may take to answer a query.
const QUERY_TIMEOUT: Duration = Duration::from_secs(10);
/// `drm_event` type of a completed fence on a polled ring.
const EVENT_FENCE_SIGNALED: u32 = 0x9000_0000;

const PARAM_3D_FEATURES: u64 = 1;
const PARAM_RESOURCE_BLOB: u64 = 3;
const PARAM_HOST_VISIBLE: u64 = 4;
const PARAM_CONTEXT_INIT: u64 = 6;
const PARAM_SUPPORTED_CAPSETS: u64 = 7;

const CONTEXT_CAPSET_ID: u64 = 1;
const CONTEXT_NUM_RINGS: u64 = 2;
const CONTEXT_POLL_RINGS_MASK: u64 = 3;

const BLOB_MEM_GUEST: u32 = 1;
const BLOB_MEM_HOST3D: u32 = 2;
const BLOB_MAPPABLE: u32 = 1;
const BLOB_SHAREABLE: u32 = 2;

const EXEC_FENCE_FD_OUT: u32 = 2;
const EXEC_RING_IDX: u32 = 4;

/// A cross-domain context on a DRM render node.
#[derive(Debug)]
pub struct VirtGpu {
    device: File,
    query: RingPage,
    channel: RingPage,
}

#[derive(Debug)]
struct RingPage {
    resource: u32,
    memory: Mapping,
}

/// Finds the render node of a virtio-gpu that offers cross-domain contexts.
///
/// # Errors
///
/// `NotFound`, naming what was looked for.
pub fn find_device() -> io::Result<PathBuf> {
    let mut nodes: Vec<PathBuf> = std::fs::read_dir("/dev/dri")?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("renderD")))
        .collect();
    nodes.sort();
    nodes.into_iter().find(|path| open_device(path).is_ok()).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "no render node in /dev/dri offers cross-domain virtio-gpu contexts")
    })
}

/// Opens a render node and checks that it can do what the proxy needs.
fn open_device(path: &Path) -> io::Result<File> {
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)?;
    for (param, name) in [
        (PARAM_3D_FEATURES, "3D commands"),
        (PARAM_RESOURCE_BLOB, "blob resources"),
        (PARAM_HOST_VISIBLE, "host-visible memory"),
        (PARAM_CONTEXT_INIT, "typed contexts"),
    ] {
        if ioctl::get_param(&device, param)? == 0 {
            return Err(io::Error::new(io::ErrorKind::Unsupported, format!("{} lacks {name}", path.display())));
        }
    }
    if ioctl::get_param(&device, PARAM_SUPPORTED_CAPSETS)? >> CAPSET_CROSS_DOMAIN & 1 == 0 {
        let text = format!("{} offers no cross-domain capability set", path.display());
        return Err(io::Error::new(io::ErrorKind::Unsupported, text));
    }
    Ok(device)
}

impl VirtGpu {
    /// Opens a context on the render node at `path`.
    ///
    /// # Errors
    ///
    /// The node cannot be opened, lacks a feature, or the host refuses the context.
    pub fn open(path: &Path) -> io::Result<Self> {
        let device = open_device(path)?;
        let poll_mask = 1 << (Ring::Channel as u64);
        let params =
            [(CONTEXT_CAPSET_ID, CAPSET_CROSS_DOMAIN), (CONTEXT_NUM_RINGS, 2), (CONTEXT_POLL_RINGS_MASK, poll_mask)];
        ioctl::context_init(&device, &params.map(|(param, value)| ioctl::ContextParam { param, value }))?;
        let query = RingPage::new(&device)?;
        let channel = RingPage::new(&device)?;
        Ok(Self { device, query, channel })
    }

    fn page(&self, ring: Ring) -> &RingPage {
        match ring {
            Ring::Query => &self.query,
            Ring::Channel => &self.channel,
        }
    }
}

impl RingPage {
    /// A page of guest memory the host writes to. Its handle lives as long as the context.
    fn new(device: &File) -> io::Result<Self> {
        let (handle, resource) = ioctl::create_blob(device, BLOB_MEM_GUEST, BLOB_MAPPABLE, RING_SIZE as u64, 0)?;
        let offset = ioctl::map_offset(device, handle)?;
        Ok(Self { resource, memory: Mapping::new(device.as_fd(), offset, RING_SIZE, true)? })
    }
}

impl Gpu for VirtGpu {
    fn ring_id(&self, ring: Ring) -> u32 {
        self.page(ring).resource
    }

    fn ring(&mut self, ring: Ring) -> &mut Mapping {
        match ring {
            Ring::Query => &mut self.query.memory,
            Ring::Channel => &mut self.channel.memory,
        }
    }

    fn submit(&mut self, command: &[u8]) -> io::Result<()> {
        ioctl::execute(&self.device, command, 0, Ring::Query as u32).map(drop)
    }

    fn submit_poll(&mut self, command: &[u8]) -> io::Result<()> {
        ioctl::execute(&self.device, command, EXEC_RING_IDX, Ring::Channel as u32).map(drop)
    }

    fn query(&mut self, command: &[u8]) -> io::Result<()> {
        let flags = EXEC_RING_IDX | EXEC_FENCE_FD_OUT;
        let fence = ioctl::execute(&self.device, command, flags, Ring::Query as u32)?;
        // SAFETY: with FENCE_FD_OUT the kernel returned a new descriptor that nobody else owns.
        #[expect(unsafe_code, reason = "the ioctl hands over a descriptor as a number")]
        let fence = unsafe { OwnedFd::from_raw_fd(fence) };
        let timeout = Timespec::try_from(QUERY_TIMEOUT).map_err(|_| io::ErrorKind::InvalidInput)?;
        loop {
            match rustix::event::poll(&mut [PollFd::new(&fence, PollFlags::IN)], Some(&timeout)) {
                Ok(0) => return Err(io::ErrorKind::TimedOut.into()),
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn event_fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    fn take_event(&mut self) -> io::Result<bool> {
        // A drm_event is `u32 type, u32 length`; the driver sends no other fields with this one.
        let mut event = [0; 64];
        match self.device.read(&mut event) {
            Ok(count) => Ok(count >= 8 && event.get(..4) == Some(&EVENT_FENCE_SIGNALED.to_ne_bytes())),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn create_blob(&mut self, blob_id: u32, size: usize, writable: bool) -> io::Result<HostBlob> {
        let flags = BLOB_MAPPABLE | BLOB_SHAREABLE;
        let (handle, resource) = ioctl::create_blob(&self.device, BLOB_MEM_HOST3D, flags, size as u64, blob_id)?;
        let memory = ioctl::map_offset(&self.device, handle)
            .and_then(|offset| Mapping::new(self.device.as_fd(), offset, size, writable));
        match memory {
            Ok(memory) => Ok(HostBlob { handle, resource, memory }),
            Err(error) => {
                ioctl::close_handle(&self.device, handle);
                Err(error)
            }
        }
    }

    fn destroy_blob(&mut self, blob: HostBlob) {
        drop(blob.memory);
        ioctl::close_handle(&self.device, blob.handle);
    }
}

/// The ioctls, each behind a safe function. Layouts and numbers: `include/uapi/drm/{drm,virtgpu_drm}.h`.
#[expect(unsafe_code, reason = "ioctl is untyped; each function pairs a number with the structure it takes")]
mod ioctl {
    use super::{AsRawFd, File, io};
    use std::ffi::c_int;

    #[repr(C)]
    pub struct ContextParam {
        pub param: u64,
        pub value: u64,
    }

    #[repr(C)]
    struct GetParam {
        param: u64,
        value: u64,
    }

    #[repr(C)]
    struct ContextInit {
        num_params: u32,
        pad: u32,
        params: u64,
    }

    #[repr(C)]
    struct CreateBlob {
        blob_mem: u32,
        blob_flags: u32,
        bo_handle: u32,
        res_handle: u32,
        size: u64,
        pad: u32,
        cmd_size: u32,
        cmd: u64,
        blob_id: u64,
    }

    #[repr(C)]
    struct Map {
        offset: u64,
        handle: u32,
        pad: u32,
    }

    #[repr(C)]
    struct GemClose {
        handle: u32,
        pad: u32,
    }

    /// Without the sync-object fields that Linux 6.6 appended: the kernel zero-fills what a caller leaves out.
    #[repr(C)]
    struct ExecBuffer {
        flags: u32,
        size: u32,
        command: u64,
        bo_handles: u64,
        num_bo_handles: u32,
        fence_fd: i32,
        ring_idx: u32,
        pad: u32,
    }

    const READ_WRITE: u64 = 3;
    const WRITE: u64 = 1;
    const GEM_CLOSE: u64 = 0x09;
    const MAP: u64 = 0x41;
    const EXECBUFFER: u64 = 0x42;
    const GETPARAM: u64 = 0x43;
    const RESOURCE_CREATE_BLOB: u64 = 0x4a;
    const CONTEXT_INIT: u64 = 0x4b;

    fn call<T>(device: &File, direction: u64, number: u64, arg: &mut T) -> io::Result<()> {
        let request = direction << 30 | (size_of::<T>() as u64) << 16 | u64::from(b'd') << 8 | number;
        loop {
            // SAFETY: the request number carries the size of `T`, so the kernel reads and writes no more than `arg`; every
            // pointer inside `arg` was made from a live reference by the functions below, with its true length.
            let result = unsafe { libc::ioctl(device.as_raw_fd(), request as _, std::ptr::from_mut(arg)) };
            if result != -1 {
                return Ok(());
            }
            let error = io::Error::last_os_error();
            if !matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN)) {
                return Err(error);
            }
        }
    }

    /// A driver parameter. The kernel writes a C int through the pointer in `value`.
    pub fn get_param(device: &File, param: u64) -> io::Result<u32> {
        let mut value: c_int = 0;
        let mut arg = GetParam { param, value: std::ptr::from_mut(&mut value) as u64 };
        call(device, READ_WRITE, GETPARAM, &mut arg)?;
        Ok(value.cast_unsigned())
    }

    pub fn context_init(device: &File, params: &[ContextParam; 3]) -> io::Result<()> {
        let mut arg = ContextInit { num_params: 3, pad: 0, params: params.as_ptr() as u64 };
        call(device, READ_WRITE, CONTEXT_INIT, &mut arg)
    }

    /// Returns the handle and the resource id.
    pub fn create_blob(device: &File, mem: u32, flags: u32, size: u64, blob_id: u32) -> io::Result<(u32, u32)> {
        let mut arg = CreateBlob {
            blob_mem: mem,
            blob_flags: flags,
            bo_handle: 0,
            res_handle: 0,
            size,
            pad: 0,
            cmd_size: 0,
            cmd: 0,
            blob_id: u64::from(blob_id),
        };
        call(device, READ_WRITE, RESOURCE_CREATE_BLOB, &mut arg)?;
        Ok((arg.bo_handle, arg.res_handle))
    }

    /// Where in the device file a handle's memory can be mapped.
    pub fn map_offset(device: &File, handle: u32) -> io::Result<u64> {
        let mut arg = Map { offset: 0, handle, pad: 0 };
        call(device, READ_WRITE, MAP, &mut arg)?;
        Ok(arg.offset)
    }

    pub fn close_handle(device: &File, handle: u32) {
        // Only an unknown handle can fail, and then there is nothing to free.
        let _ = call(device, WRITE, GEM_CLOSE, &mut GemClose { handle, pad: 0 });
    }

    /// Returns the fence's descriptor, which is only valid with `EXEC_FENCE_FD_OUT`.
    pub fn execute(device: &File, command: &[u8], flags: u32, ring_idx: u32) -> io::Result<i32> {
        let mut arg = ExecBuffer {
            flags,
            size: u32::try_from(command.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
            command: command.as_ptr() as u64,
            bo_handles: 0,
            num_bo_handles: 0,
            fence_fd: -1,
            ring_idx,
            pad: 0,
        };
        call(device, READ_WRITE, EXECBUFFER, &mut arg)?;
        Ok(arg.fence_fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_no_render_node_is_refused() {
        assert!(VirtGpu::open(Path::new("/dev/null")).is_err());
        assert!(VirtGpu::open(Path::new("/nonexistent")).is_err());
    }
}
