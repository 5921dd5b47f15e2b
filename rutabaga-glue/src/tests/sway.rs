//! A guest's window on a real desktop: a headless sway that the test starts and ends itself.

use std::collections::{HashMap, VecDeque};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use virtio_devices::gpu::protocol::resp;

use super::guest::{Event, Guest};
use crate::validate::ID_BLOB;

/// The desktop of `scripts/compositor`.
struct Desktop {
    dir: tempfile::TempDir,
    environment: HashMap<String, String>,
}

fn script() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/compositor")
}

impl Desktop {
    fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("desk-").tempdir_in("/tmp").unwrap();
        let output = Command::new(script()).arg("start").arg(dir.path()).output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            output.status.success(),
            "no headless sway, which this test needs (scripts/install desktop): {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let pairs = text.lines().filter_map(|line| line.split_once('='));
        Self { dir, environment: pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect() }
    }

    fn socket(&self) -> PathBuf {
        Path::new(&self.environment["XDG_RUNTIME_DIR"]).join(&self.environment["WAYLAND_DISPLAY"])
    }

    fn command(&self, client: &[&str]) -> Command {
        let mut command = Command::new(script());
        command.arg("run").arg(self.dir.path()).args(client);
        command
    }

    /// How many pixels of the screen have this colour.
    fn count(&self, rgb: [u8; 3]) -> usize {
        let output = self.command(&["grim", "-t", "ppm", "-"]).output().unwrap();
        assert!(output.status.success(), "grim: {}", String::from_utf8_lossy(&output.stderr));
        // "P6 800 600 255\n", then pixels.
        let header = output.stdout.iter().enumerate().filter(|(_, b)| b.is_ascii_whitespace()).nth(3).unwrap().0;
        output.stdout[header + 1..].chunks_exact(3).filter(|pixel| **pixel == rgb).count()
    }
}

impl Drop for Desktop {
    fn drop(&mut self) {
        let _ = Command::new(script()).arg("stop").arg(self.dir.path()).status();
    }
}

/// A client of the desktop's own side that ends with the test.
struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// As much of a Wayland client as it takes.
struct Client {
    guest: Guest,
    inbox: Vec<u8>,
    files: VecDeque<(u32, u32, u32)>,
    globals: HashMap<String, u32>,
    next: u32,
    /// The window's surface and its role.
    window: Option<(u32, u32)>,
}

const DISPLAY: u32 = 1;
const REGISTRY: u32 = 2;
const CONTEXT: u32 = 1;

fn string(text: &str) -> Vec<u8> {
    let mut bytes = u32::try_from(text.len() + 1).unwrap().to_le_bytes().to_vec();
    bytes.extend_from_slice(text.as_bytes());
    bytes.resize(4 + (text.len() + 1).next_multiple_of(4), 0);
    bytes
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|w| w.to_le_bytes()).collect()
}

fn word(bytes: &[u8], index: usize) -> u32 {
    u32::from_le_bytes(bytes[4 * index..4 * index + 4].try_into().unwrap())
}

impl Client {
    fn connect(socket: &Path) -> Self {
        let mut guest = Guest::new(socket);
        guest.context(CONTEXT);
        let mut client = Self {
            guest,
            inbox: Vec::new(),
            files: VecDeque::new(),
            globals: HashMap::new(),
            next: REGISTRY + 1,
            window: None,
        };
        client.request(DISPLAY, 1, &words(&[REGISTRY]), &[]);
        client.round_trip();
        client
    }

    fn id(&mut self) -> u32 {
        self.next += 1;
        self.next - 1
    }

    fn request(&mut self, object: u32, opcode: u32, arguments: &[u8], files: &[(u32, u32)]) {
        let size = u32::try_from(8 + arguments.len()).unwrap();
        let message = [&words(&[object, size << 16 | opcode]), arguments].concat();
        assert_eq!(self.guest.send(CONTEXT, &message, files), resp::OK_NODATA);
    }

    /// The next event: object, opcode, arguments.
    fn event(&mut self) -> (u32, u32, Vec<u8>) {
        loop {
            if self.inbox.len() >= 8 {
                let size = (word(&self.inbox, 1) >> 16) as usize;
                if self.inbox.len() >= size {
                    let event: Vec<u8> = self.inbox.drain(..size).collect();
                    let (object, opcode) = (word(&event, 0), word(&event, 1) & 0xffff);
                    assert!((object, opcode) != (DISPLAY, 0), "protocol error: {}", String::from_utf8_lossy(&event));
                    if (object, opcode) == (REGISTRY, 0) {
                        let len = word(&event, 3) as usize;
                        let interface = String::from_utf8_lossy(&event[16..16 + len - 1]).into_owned();
                        self.globals.insert(interface, word(&event, 2));
                    }
                    if let Some((surface, role)) = self.window
                        && (object, opcode) == (role, 0)
                    {
                        self.request(role, 4, &words(&[word(&event, 2)]), &[]);
                        self.request(surface, 6, &[], &[]);
                    }
                    return (object, opcode, event[8..].to_vec());
                }
            }
            match self.guest.next(CONTEXT) {
                Event::Message(bytes, files) => {
                    assert!(!bytes.is_empty(), "the compositor hung up");
                    self.inbox.extend(bytes);
                    self.files.extend(files);
                }
                other => panic!("{other:?}"),
            }
        }
    }

    fn wait_for(&mut self, object: u32, opcode: u32) -> Vec<u8> {
        loop {
            let (o, c, body) = self.event();
            if (o, c) == (object, opcode) {
                return body;
            }
        }
    }

    fn round_trip(&mut self) {
        let callback = self.id();
        self.request(DISPLAY, 0, &words(&[callback]), &[]);
        self.wait_for(callback, 0);
    }

    fn bind(&mut self, interface: &str, version: u32) -> u32 {
        let id = self.id();
        let name = self.globals[interface];
        let arguments = [words(&[name]), string(interface), words(&[version, id])].concat();
        self.request(REGISTRY, 0, &arguments, &[]);
        id
    }

    /// A window of one colour, on the screen when this returns. Its surface.
    fn window(&mut self, width: u32, height: u32, pixel: u32) -> u32 {
        let compositor = self.bind("wl_compositor", 4);
        let shm = self.bind("wl_shm", 1);
        let shell = self.bind("xdg_wm_base", 1);
        let (surface, xdg_surface, toplevel) = (self.id(), self.id(), self.id());
        self.request(compositor, 0, &words(&[surface]), &[]);
        self.request(shell, 2, &words(&[xdg_surface, surface]), &[]);
        self.request(xdg_surface, 1, &words(&[toplevel]), &[]);
        self.request(toplevel, 2, &string("window of a guest"), &[]);
        self.request(surface, 6, &[], &[]);
        self.window = Some((surface, xdg_surface));
        self.wait_for(xdg_surface, 0);

        let (size, blob_id) = self.guest.image(CONTEXT, width, height).unwrap();
        let blob = self.guest.blob(CONTEXT, u64::from(blob_id), size).unwrap();
        assert_eq!(self.guest.map(blob, 0), resp::OK_MAP_INFO);
        self.guest.fill_window(0, (width * height) as usize, pixel);
        let (pool, buffer, frame) = (self.id(), self.id(), self.id());
        self.request(shm, 0, &words(&[pool, u32::try_from(size).unwrap()]), &[(blob, ID_BLOB)]);
        self.request(pool, 0, &words(&[buffer, 0, width, height, width * 4, 1]), &[]);
        self.request(surface, 1, &words(&[buffer, 0, 0]), &[]);
        self.request(surface, 2, &words(&[0, 0, width, height]), &[]);
        self.request(surface, 3, &words(&[frame]), &[]);
        self.request(surface, 6, &[], &[]);
        self.wait_for(frame, 0);
        surface
    }
}

#[test]
fn a_guests_window_is_on_the_desktop_and_gets_the_keymap() {
    let desktop = Desktop::start();
    let mut client = Client::connect(&desktop.socket());
    assert!(client.globals.len() > 20, "{:?}", client.globals);
    let colour = [0xe0, 0x40, 0x60];
    assert_eq!(desktop.count(colour), 0);
    let surface = client.window(300, 200, 0xffe0_4060);
    // sway shows a new window when it has settled its size with the client.
    let mut seen = 0;
    for _ in 0..100 {
        client.round_trip();
        seen = seen.max(desktop.count(colour));
        if seen > 300 * 150 {
            break;
        }
    }
    assert!(seen > 300 * 150, "only {seen} pixels of the guest's window are on the screen");

    // A keyboard, for as long as the helper types; sway sends its keymap as a file opened read-only.
    let _typing = Helper(desktop.command(&["wtype", "-s", "20000", "x"]).stdout(Stdio::null()).spawn().unwrap());
    let seat = client.bind("wl_seat", 5);
    while word(&client.wait_for(seat, 0), 0) & 2 == 0 {}
    let keyboard = client.id();
    client.request(seat, 1, &words(&[keyboard]), &[]);
    let keymap = client.wait_for(keyboard, 0);
    let (blob_id, kind, size) = client.files.pop_front().unwrap();
    assert_eq!((kind, word(&keymap, 0)), (ID_BLOB, 1));
    assert!(size >= word(&keymap, 1));
    let blob = client.guest.blob(CONTEXT, u64::from(blob_id), u64::from(size).next_multiple_of(4096)).unwrap();
    assert_eq!(client.guest.map(blob, 4 << 20), resp::OK_MAP_INFO);
    assert_eq!(client.guest.read_window(4 << 20, 10), b"xkb_keymap");

    // wl_surface.destroy would need the roles gone first; a client that just goes is the harder case.
    let _ = surface;
    client.guest.destroy(CONTEXT);
    let gone = (0..200).any(|_| desktop.count(colour) == 0);
    assert!(gone, "the window goes with the context");
}
