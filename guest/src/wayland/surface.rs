//! The double-buffered state of a `wl_surface`, as far as it decides what to copy on commit.
//!
//! An application draws the next frame into whichever of its buffers is free, and says which part of the *surface* changed
//! since the last frame. So what must be copied of a buffer is all damage since that buffer was last committed.

use super::damage::{Rect, Region};
use super::error::SessionError;
use super::objects::{Objects, State};

/// A buffer by id and serial number, so that a reused id is not taken for the old buffer.
pub type BufferKey = (u32, u64);

/// What is known of a surface.
#[derive(Debug, Default)]
pub struct Surface {
    /// Attached since the last commit: a buffer, or none at all. `None` if nothing was attached.
    pub attach: Option<Option<BufferKey>>,
    /// Attached with an offset: earlier damage no longer lines up.
    pub moved: bool,
    /// Damage in buffer pixels.
    pub damage: Region,
    /// Damage in surface coordinates.
    pub surface_damage: Region,
    /// Buffer pixels per surface unit; 0 means 1.
    pub scale: u32,
    /// `wl_output.transform`.
    pub transform: u32,
    /// A viewport scales the buffer in a way not tracked here.
    pub viewport: bool,
    current: Option<BufferKey>,
    shape: [u32; 4],
}

/// What a commit means for the buffers.
struct Commit {
    target: BufferKey,
    attached: bool,
    moved: bool,
    damage: Region,
}

impl Surface {
    /// Takes the pending state, as a commit does. `None` if there is no buffer to copy.
    fn take(&mut self) -> Option<Commit> {
        let mut damage = std::mem::take(&mut self.damage);
        let in_surface = std::mem::take(&mut self.surface_damage);
        if !in_surface.is_empty() {
            if self.transform != 0 || self.viewport {
                damage = Region::everything();
            }
            let scale = self.scale.max(1);
            for rect in in_surface.rects() {
                let [x0, y0, x1, y1] = [rect.x0, rect.y0, rect.x1, rect.y1].map(|edge| edge.saturating_mul(scale));
                damage.add(Rect { x0, y0, x1, y1 });
            }
        }
        let attach = self.attach.take();
        let moved = std::mem::take(&mut self.moved);
        if let Some(buffer) = attach {
            self.current = buffer;
        }
        let target = self.current?;
        Some(Commit { target, attached: attach.is_some(), moved, damage })
    }
}

impl Objects {
    fn surface(&mut self, id: u32) -> Option<&mut Surface> {
        match &mut self.get(id).ok()?.state {
            State::Surface(surface) => Some(surface),
            _ => None,
        }
    }

    /// The serial number of a buffer out of a pool; `None` for buffers of other kinds.
    pub fn buffer_key(&mut self, id: u32) -> Option<BufferKey> {
        match &self.get(id).ok()?.state {
            State::Buffer(buffer) => Some((id, buffer.serial)),
            _ => None,
        }
    }

    /// `wl_surface.commit`: copies what the host must see.
    ///
    /// # Errors
    ///
    /// The application's fault: its buffer's memory cannot be read.
    pub fn commit(&mut self, id: u32) -> Result<(), SessionError> {
        let Some(surface) = self.surface(id) else { return Ok(()) };
        let [scale, transform] = [surface.scale.max(1), surface.transform];
        let old_shape = surface.shape;
        let Some(Commit { target, attached, moved, damage }) = surface.take() else {
            return Ok(());
        };
        if self.buffer_key(target.0) != Some(target) {
            return Ok(());
        }
        let State::Buffer(buffer) = &mut self.get(target.0)?.state else { return Ok(()) };
        let shape = [buffer.layout.width, buffer.layout.height, scale, transform];
        let damage = if attached && (moved || shape != old_shape) { Region::everything() } else { damage };
        if buffer.surface != id {
            buffer.stale = Region::everything();
            buffer.surface = id;
        }
        buffer.stale.add_all(&damage);
        buffer.busy |= attached;
        if attached || !damage.is_empty() {
            buffer.copy(target.0)?;
        }
        if let Some(surface) = self.surface(id) {
            surface.shape = shape;
        }
        for (_, object) in self.iter_mut() {
            if let State::Buffer(other) = &mut object.state
                && other.surface == id
                && other.serial != target.1
            {
                other.stale.add_all(&damage);
            }
        }
        Ok(())
    }

    /// A surface is gone: its buffers no longer hold what anything shows.
    pub fn forget_surface(&mut self, id: u32) {
        for (_, object) in self.iter_mut() {
            if let State::Buffer(buffer) = &mut object.state
                && buffer.surface == id
            {
                buffer.surface = 0;
            }
        }
    }

    /// Whether the application shows, or could show, anything.
    pub fn has_surfaces(&mut self) -> bool {
        self.iter_mut().any(|(_, object)| matches!(object.state, State::Surface(_)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wayland::gpu::{HostBlob, Mapping};
    use crate::wayland::shm::{Blob, Buffer, Layout, Pool};
    use crate::wayland::table;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;

    /// A surface (10) with two 16x16 buffers (20, 21) in one file.
    struct Fixture {
        objects: Objects,
        file: std::fs::File,
    }

    const BYTES: u32 = 16 * 16 * 4;

    fn fixture() -> Fixture {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let pool = Pool::new(file.try_clone().unwrap().into(), 8192, 0, &mut Vec::new()).unwrap();
        let mut objects = Objects::new();
        let compositor = table::global("wl_compositor").unwrap();
        objects.create(10, compositor.requests[0].child_interface.unwrap(), 4).unwrap();
        for id in [20, 21] {
            objects.create(id, table::shm_pool(), 1).unwrap();
            let layout = Layout::new(&pool, 1, [(id - 20) * BYTES, 16, 16, 64, 0]).unwrap();
            let memory = tempfile::tempfile().unwrap();
            memory.set_len(4096).unwrap();
            let memory = Mapping::new(memory.as_fd(), 0, 4096, true).unwrap();
            let blob = Blob { host: HostBlob { handle: 0, resource: 0, memory }, pool: 0 };
            let buffer = Buffer::new(pool.clone(), layout, blob, u64::from(id));
            objects.get(id).unwrap().state = State::Buffer(Box::new(buffer));
        }
        Fixture { objects, file }
    }

    impl Fixture {
        /// Draws one pixel row value into a buffer and commits it with the given damage.
        fn frame(&mut self, buffer: u32, fill: u8, damage: Option<[i32; 4]>) {
            self.file.write_all_at(&vec![fill; BYTES as usize], u64::from((buffer - 20) * BYTES)).unwrap();
            let key = self.objects.buffer_key(buffer);
            let surface = self.objects.surface(10).unwrap();
            surface.attach = Some(key);
            if let Some(rect) = damage.and_then(|rect| Rect::new(rect, 1)) {
                surface.damage.add(rect);
            }
            self.objects.commit(10).unwrap();
        }

        fn pixel(&mut self, buffer: u32, x: usize, y: usize) -> u8 {
            let State::Buffer(buffer) = &self.objects.get(buffer).unwrap().state else { panic!() };
            let mut byte = [0];
            buffer.blob.host.memory.read(y * 64 + x * 4, &mut byte).unwrap();
            byte[0]
        }
    }

    #[test]
    fn a_new_buffer_is_copied_whole_whatever_the_damage_says() {
        let mut f = fixture();
        f.frame(20, 1, Some([0, 0, 1, 1]));
        assert_eq!(f.pixel(20, 15, 15), 1);
    }

    #[test]
    fn damage_of_frames_shown_from_other_buffers_is_made_up_for() {
        let mut f = fixture();
        f.frame(20, 1, None);
        f.frame(21, 2, None);
        f.frame(21, 3, Some([4, 4, 2, 2]));
        f.frame(20, 4, Some([8, 8, 2, 2]));
        assert_eq!(f.pixel(20, 8, 8), 4, "this frame's damage");
        assert_eq!(f.pixel(20, 4, 4), 4, "damage while the other buffer was shown");
        assert_eq!(f.pixel(20, 0, 0), 1, "undamaged");
        assert_eq!(f.pixel(21, 4, 4), 3);
        assert_eq!(f.pixel(21, 0, 0), 2);
    }

    #[test]
    fn surface_damage_is_scaled_and_a_viewport_means_everything() {
        let mut f = fixture();
        f.objects.surface(10).unwrap().scale = 2;
        f.frame(20, 1, None);
        f.objects.surface(10).unwrap().surface_damage.add(Rect::new([4, 4, 1, 1], 1).unwrap());
        f.frame(20, 2, None);
        assert_eq!([f.pixel(20, 8, 8), f.pixel(20, 9, 9), f.pixel(20, 4, 4)], [2, 2, 1]);
        let surface = f.objects.surface(10).unwrap();
        surface.viewport = true;
        surface.surface_damage.add(Rect::new([0, 0, 1, 1], 1).unwrap());
        f.frame(20, 3, None);
        assert_eq!(f.pixel(20, 15, 15), 3);
    }

    #[test]
    fn damage_without_a_new_buffer_updates_the_shown_one() {
        let mut f = fixture();
        f.frame(20, 1, None);
        f.file.write_all_at(&vec![9; BYTES as usize], 0).unwrap();
        f.objects.surface(10).unwrap().damage.add(Rect::new([0, 0, 3, 3], 1).unwrap());
        f.objects.commit(10).unwrap();
        assert_eq!([f.pixel(20, 2, 2), f.pixel(20, 3, 3)], [9, 1]);
        f.objects.commit(10).unwrap();
        assert_eq!(f.pixel(20, 3, 3), 1, "nothing attached, nothing damaged");
    }

    #[test]
    fn another_scale_or_a_destroyed_surface_makes_everything_stale() {
        let mut f = fixture();
        f.frame(20, 1, None);
        f.objects.surface(10).unwrap().scale = 3;
        f.frame(20, 2, None);
        assert_eq!(f.pixel(20, 15, 15), 2);
        f.objects.forget_surface(10);
        f.frame(20, 3, None);
        assert_eq!(f.pixel(20, 15, 15), 3);
    }
}
