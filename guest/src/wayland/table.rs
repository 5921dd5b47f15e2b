//! Which Wayland interfaces the proxy knows: the message tables it parses with.
//!
//! The tables are generated from the protocols' XML by `wayland-scanner`; here is only the list of globals a guest may
//! bind. Everything else an application can reach is reached through them. A global that is not listed is hidden,
//! because without its table the proxy could not tell how many file descriptors belong to a message. Protocols whose
//! descriptors cannot cross the VM boundary (dma-bufs, DRM leases, sync objects) are left out on purpose.

use std::collections::HashMap;
use std::sync::LazyLock;

use wayland_backend::protocol::Interface;
use wayland_client::Proxy;
use wayland_client::protocol as core;
use wayland_protocols::ext::{data_control, idle_notify};
use wayland_protocols::wp;
use wayland_protocols::xdg;
use wayland_protocols_wlr::data_control as wlr_data_control;

/// A message table, as the scanner generates it.
pub type Table = &'static Interface;

macro_rules! globals {
    ($($proxy:path),* $(,)?) => { [$(<$proxy as Proxy>::interface()),*] };
}

static GLOBALS: LazyLock<HashMap<&'static str, Table>> = LazyLock::new(|| {
    let all: [Table; 40] = globals![
        core::wl_compositor::WlCompositor,
        core::wl_subcompositor::WlSubcompositor,
        core::wl_shm::WlShm,
        core::wl_seat::WlSeat,
        core::wl_output::WlOutput,
        core::wl_data_device_manager::WlDataDeviceManager,
        xdg::shell::client::xdg_wm_base::XdgWmBase,
        xdg::activation::v1::client::xdg_activation_v1::XdgActivationV1,
        xdg::decoration::zv1::client::zxdg_decoration_manager_v1::ZxdgDecorationManagerV1,
        xdg::dialog::v1::client::xdg_wm_dialog_v1::XdgWmDialogV1,
        xdg::foreign::zv2::client::zxdg_exporter_v2::ZxdgExporterV2,
        xdg::foreign::zv2::client::zxdg_importer_v2::ZxdgImporterV2,
        xdg::system_bell::v1::client::xdg_system_bell_v1::XdgSystemBellV1,
        xdg::toplevel_drag::v1::client::xdg_toplevel_drag_manager_v1::XdgToplevelDragManagerV1,
        xdg::toplevel_icon::v1::client::xdg_toplevel_icon_manager_v1::XdgToplevelIconManagerV1,
        xdg::toplevel_tag::v1::client::xdg_toplevel_tag_manager_v1::XdgToplevelTagManagerV1,
        xdg::xdg_output::zv1::client::zxdg_output_manager_v1::ZxdgOutputManagerV1,
        wp::alpha_modifier::v1::client::wp_alpha_modifier_v1::WpAlphaModifierV1,
        wp::commit_timing::v1::client::wp_commit_timing_manager_v1::WpCommitTimingManagerV1,
        wp::content_type::v1::client::wp_content_type_manager_v1::WpContentTypeManagerV1,
        wp::cursor_shape::v1::client::wp_cursor_shape_manager_v1::WpCursorShapeManagerV1,
        wp::fifo::v1::client::wp_fifo_manager_v1::WpFifoManagerV1,
        wp::fractional_scale::v1::client::wp_fractional_scale_manager_v1::WpFractionalScaleManagerV1,
        wp::idle_inhibit::zv1::client::zwp_idle_inhibit_manager_v1::ZwpIdleInhibitManagerV1,
        wp::input_timestamps::zv1::client::zwp_input_timestamps_manager_v1::ZwpInputTimestampsManagerV1,
        wp::keyboard_shortcuts_inhibit::zv1::client::zwp_keyboard_shortcuts_inhibit_manager_v1::ZwpKeyboardShortcutsInhibitManagerV1,
        wp::pointer_constraints::zv1::client::zwp_pointer_constraints_v1::ZwpPointerConstraintsV1,
        wp::pointer_gestures::zv1::client::zwp_pointer_gestures_v1::ZwpPointerGesturesV1,
        wp::pointer_warp::v1::client::wp_pointer_warp_v1::WpPointerWarpV1,
        wp::presentation_time::client::wp_presentation::WpPresentation,
        wp::primary_selection::zv1::client::zwp_primary_selection_device_manager_v1::ZwpPrimarySelectionDeviceManagerV1,
        wp::relative_pointer::zv1::client::zwp_relative_pointer_manager_v1::ZwpRelativePointerManagerV1,
        wp::single_pixel_buffer::v1::client::wp_single_pixel_buffer_manager_v1::WpSinglePixelBufferManagerV1,
        wp::tablet::zv2::client::zwp_tablet_manager_v2::ZwpTabletManagerV2,
        wp::tearing_control::v1::client::wp_tearing_control_manager_v1::WpTearingControlManagerV1,
        wp::text_input::zv3::client::zwp_text_input_manager_v3::ZwpTextInputManagerV3,
        wp::viewporter::client::wp_viewporter::WpViewporter,
        idle_notify::v1::client::ext_idle_notifier_v1::ExtIdleNotifierV1,
        data_control::v1::client::ext_data_control_manager_v1::ExtDataControlManagerV1,
        wlr_data_control::v1::client::zwlr_data_control_manager_v1::ZwlrDataControlManagerV1,
    ];
    all.into_iter().map(|table| (table.name, table)).collect()
});

/// The table of `wl_display`, object 1 of every connection.
pub fn display() -> Table {
    // `WlDisplay` is hand-written in wayland-client; only its generated table is of use.
    &core::__interfaces::WL_DISPLAY_INTERFACE
}

/// The table of `wl_shm_pool`, which the proxy creates on the host on its own account.
pub fn shm_pool() -> Table {
    core::wl_shm_pool::WlShmPool::interface()
}

/// The table of a global the guest may see, or `None` if it stays hidden.
pub fn global(name: &str) -> Option<Table> {
    GLOBALS.get(name).copied()
}

/// Opcodes of the few messages the proxy treats specially (`wayland.xml`; stable, they are the wire format).
pub mod op {
    /// `wl_display` event: fatal error.
    pub const DISPLAY_ERROR: u16 = 0;
    /// `wl_display` event: an object id is free again.
    pub const DISPLAY_DELETE_ID: u16 = 1;
    /// `wl_registry` request.
    pub const REGISTRY_BIND: u16 = 0;
    /// `wl_registry` event: a global appeared.
    pub const REGISTRY_GLOBAL: u16 = 0;
    /// `wl_registry` event: a global went away.
    pub const REGISTRY_GLOBAL_REMOVE: u16 = 1;
    /// `wl_shm` request.
    pub const SHM_CREATE_POOL: u16 = 0;
    /// `wl_shm` request (since 2).
    pub const SHM_RELEASE: u16 = 1;
    /// `wl_shm_pool` request.
    pub const POOL_CREATE_BUFFER: u16 = 0;
    /// `wl_shm_pool` request.
    pub const POOL_DESTROY: u16 = 1;
    /// `wl_shm_pool` request.
    pub const POOL_RESIZE: u16 = 2;
    /// `wl_buffer` request.
    pub const BUFFER_DESTROY: u16 = 0;
    /// `wl_buffer` event.
    pub const BUFFER_RELEASE: u16 = 0;
    /// `wl_surface` request.
    pub const SURFACE_ATTACH: u16 = 1;
    /// `wl_surface` request, in surface coordinates.
    pub const SURFACE_DAMAGE: u16 = 2;
    /// `wl_surface` request.
    pub const SURFACE_COMMIT: u16 = 6;
    /// `wl_surface` request.
    pub const SURFACE_SET_BUFFER_TRANSFORM: u16 = 7;
    /// `wl_surface` request.
    pub const SURFACE_SET_BUFFER_SCALE: u16 = 8;
    /// `wl_surface` request, in buffer coordinates.
    pub const SURFACE_DAMAGE_BUFFER: u16 = 9;
    /// `wl_surface` request (since 5).
    pub const SURFACE_OFFSET: u16 = 10;
    /// `wp_viewporter` request.
    pub const VIEWPORTER_GET_VIEWPORT: u16 = 1;
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;
    use wayland_backend::protocol::{ArgumentType, MessageDesc};

    fn reachable() -> Vec<Table> {
        let mut todo: Vec<Table> = GLOBALS.values().copied().chain([display()]).collect();
        let mut seen = HashSet::new();
        let mut all = Vec::new();
        while let Some(table) = todo.pop() {
            if seen.insert(table.name) {
                all.push(table);
                todo.extend(table.requests.iter().chain(table.events).filter_map(|m| m.child_interface));
            }
        }
        all
    }

    #[test]
    fn opcodes_name_the_messages_they_claim() {
        let name = |table: Table, opcode: u16| table.requests[usize::from(opcode)].name;
        let surface = core::wl_surface::WlSurface::interface();
        assert_eq!(name(surface, op::SURFACE_ATTACH), "attach");
        assert_eq!(name(surface, op::SURFACE_DAMAGE), "damage");
        assert_eq!(name(surface, op::SURFACE_COMMIT), "commit");
        assert_eq!(name(surface, op::SURFACE_SET_BUFFER_TRANSFORM), "set_buffer_transform");
        assert_eq!(name(surface, op::SURFACE_SET_BUFFER_SCALE), "set_buffer_scale");
        assert_eq!(name(surface, op::SURFACE_DAMAGE_BUFFER), "damage_buffer");
        assert_eq!(name(surface, op::SURFACE_OFFSET), "offset");
        assert_eq!(name(shm_pool(), op::POOL_RESIZE), "resize");
        assert_eq!(name(shm_pool(), op::POOL_DESTROY), "destroy");
        let shm = global("wl_shm").unwrap();
        assert_eq!(name(shm, op::SHM_CREATE_POOL), "create_pool");
        assert_eq!(name(shm, op::SHM_RELEASE), "release");
        assert_eq!(name(global("wp_viewporter").unwrap(), op::VIEWPORTER_GET_VIEWPORT), "get_viewport");
        assert_eq!(display().events[usize::from(op::DISPLAY_DELETE_ID)].name, "delete_id");
    }

    #[test]
    fn every_descriptor_in_reach_is_of_a_kind_that_crosses_the_vm_boundary() {
        let takes_fd = |m: &&MessageDesc| m.signature.contains(&ArgumentType::Fd);
        let mut requests = HashSet::new();
        let mut events = HashSet::new();
        for table in reachable() {
            requests.extend(table.requests.iter().filter(takes_fd).map(|m| format!("{}.{}", table.name, m.name)));
            events.extend(table.events.iter().filter(takes_fd).map(|m| format!("{}.{}", table.name, m.name)));
        }
        requests.remove("wl_shm.create_pool");
        assert!(
            requests.iter().all(|m| m.ends_with("offer.receive") || m.ends_with("offer_v1.receive")),
            "{requests:?}"
        );
        assert!(events.remove("wl_keyboard.keymap"));
        assert!(events.iter().all(|m| m.ends_with("source.send") || m.ends_with("source_v1.send")), "{events:?}");
    }

    #[test]
    fn globals_with_descriptors_that_cannot_cross_are_hidden() {
        for name in ["zwp_linux_dmabuf_v1", "wl_drm", "wp_drm_lease_device_v1", "wp_linux_drm_syncobj_manager_v1"] {
            assert!(global(name).is_none(), "{name}");
        }
        assert!(global("no_such_interface").is_none());
    }
}
