//! Real applications through the proxy to a real compositor: proxy, host renderer and sway, without a VM in between.

mod desktop;
mod direct;

use desktop::{App, Desktop, spawn, wait_for};
use spectrum_guest::wayland::{self, Options};

/// A desktop with a proxy in front of it.
fn desktop() -> Desktop {
    let desktop = Desktop::start();
    let host = direct::Host::new(&desktop.socket());
    let mut options = Options::new(desktop.proxy_socket());
    options.owner = desktop.owner();
    let listener = wayland::listen(&options).unwrap();
    std::thread::spawn(move || wayland::serve(&listener, options.max_clients, move || host.open()));
    desktop
}

fn foot(desktop: &Desktop, script: &str) -> App {
    let app = spawn(desktop.guest("foot").args(["--log-level=error", "sh", "-c", script]));
    wait_for("foot's window", || (desktop.windows("foot") > 0).then_some(()));
    app
}

/// The share of pixels of this colour, in percent.
fn share(desktop: &Desktop, name: &str, colour: [u8; 3]) -> usize {
    let (width, height, pixels) = desktop.screenshot(name);
    pixels.chunks(3).filter(|pixel| *pixel == colour).count() * 100 / (width * height)
}

#[test]
fn a_terminal_shows_its_colours_and_takes_what_is_typed() {
    let desktop = desktop();
    let file = desktop.file("typed");
    // The colour comes after the first line, when the window has its final size.
    let script =
        format!("read go; printf '\\033[48;2;10;200;30m\\033[2J'; read line; echo \"$line\" > {}", file.display());
    let _foot = foot(&desktop, &script);
    desktop.type_line("");
    wait_for("the terminal's background", || (share(&desktop, "foot", [10, 200, 30]) > 60).then_some(()));
    desktop.type_line("hello from the host");
    let typed = wait_for("the typed line", || std::fs::read_to_string(&file).ok().filter(|text| text.ends_with('\n')));
    assert_eq!(typed, "hello from the host\n");
    wait_for("the window to close", || (desktop.windows("foot") == 0).then_some(()));
}
