//! The connection that tells the host that requests are welcome, and whose end tells the agent that the VM was restored: a
//! restore breaks every vsock connection (virtio 1.2 section 5.10.6.6.1, VIRTIO_VSOCK_EVENT_TRANSPORT_RESET).

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::OwnedFd,
};

use guest_proto::{FromAgent, Hello, Message, VERSION};

use super::gate::Gate;
use crate::console::say;

/// Announces the agent, one connection at a time. When one has ended, closes the gate and announces it again. `connect` makes the
/// connection to the host. Never returns.
pub fn keep_announced(gate: &Gate, connect: impl Fn() -> io::Result<OwnedFd>) -> ! {
    let mut told = false;
    loop {
        let seen = gate.knocks();
        match greet(&connect) {
            Ok(host) => {
                wait_for_end(host);
                gate.sleep();
            }
            Err(error) => {
                if !told {
                    say!("agent: nobody on the host waits for this VM: {error}");
                    told = true;
                }
                // Whoever wants something of the agent may listen by now.
                gate.wait_for_knock(seen);
            }
        }
    }
}

fn greet(connect: impl Fn() -> io::Result<OwnedFd>) -> io::Result<File> {
    let mut hello = Vec::new();
    FromAgent::Hello(Hello { version: VERSION }).encode(&mut hello).map_err(io::Error::other)?;
    let mut host = File::from(connect()?);
    host.write_all(&hello)?;
    Ok(host)
}

/// Blocks until the connection is closed or reset. Nothing is to come on it.
fn wait_for_end(mut host: File) {
    let mut nothing = [0; 64];
    loop {
        match host.read(&mut nothing) {
            Ok(0) => return,
            Err(error) if error.kind() != io::ErrorKind::Interrupted => return,
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        convert::Infallible,
        os::unix::net::UnixStream,
        sync::{Arc, mpsc},
        thread,
    };

    use guest_proto::{Link, ToAgent};

    use super::*;

    /// The host's end of a gate that is kept announced: answers each attempt to connect.
    struct Host {
        gate: Arc<Gate>,
        attempts: mpsc::Receiver<mpsc::Sender<io::Result<OwnedFd>>>,
    }

    impl Host {
        fn new() -> Self {
            let gate = Arc::new(Gate::default());
            let (ask, attempts) = mpsc::channel::<mpsc::Sender<_>>();
            let agent = gate.clone();
            // It lives as long as the test program.
            thread::spawn(move || {
                keep_announced(&agent, || {
                    let (tell, answer) = mpsc::channel();
                    ask.send(tell).map_err(io::Error::other)?;
                    answer.recv().map_err(io::Error::other)?
                })
            });
            Self { gate, attempts }
        }

        fn refuse(&self) {
            self.attempts.recv().unwrap().send(Err(io::ErrorKind::ConnectionReset.into())).unwrap();
        }

        /// Accepts an attempt and hears the greeting.
        fn accept(&self) -> Link<FromAgent, ToAgent> {
            let (a, b) = UnixStream::pair().unwrap();
            self.attempts.recv().unwrap().send(Ok(b.into())).unwrap();
            let mut link = Link::new(a.into()).unwrap();
            assert_eq!(link.exchange(20).unwrap(), FromAgent::Hello(Hello { version: VERSION }));
            link
        }

        fn wake(&self) {
            self.gate.wake(|| Ok::<_, Infallible>(())).unwrap();
        }
    }

    #[test]
    fn a_connection_that_ends_closes_the_gate_before_the_next_greeting() {
        let host = Host::new();
        for _ in 0..3 {
            let link = host.accept();
            assert!(!host.gate.is_awake());
            host.wake();
            assert!(host.gate.is_awake());
            drop(link);
        }
    }

    #[test]
    fn what_the_host_says_there_does_not_matter() {
        let host = Host::new();
        let mut link = host.accept();
        host.wake();
        link.queue(&ToAgent::Stdin(vec![0; 1000])).unwrap();
        link.flush().unwrap();
        assert!(host.gate.is_awake());
        drop(link);
        drop(host.accept());
    }

    #[test]
    fn an_agent_nobody_waits_for_tries_again_when_somebody_comes() {
        let host = Host::new();
        host.refuse();
        host.gate.knock();
        host.refuse();
        // No attempt without a reason.
        assert!(host.attempts.try_recv().is_err());
        // The one who came may wake it although the greeting comes later.
        host.wake();
        host.gate.knock();
        let link = host.accept();
        assert!(host.gate.is_awake(), "nothing was restored");
        drop(link);
        host.accept();
        assert!(!host.gate.is_awake());
    }

    #[test]
    fn who_did_not_become_another_stays_asleep() {
        let gate = Gate::default();
        assert_eq!(gate.wake(|| Err("clock")), Err("clock"));
        assert!(!gate.is_awake());
        gate.wake(|| Ok::<_, Infallible>(())).unwrap();
        assert_eq!(gate.wake(|| Err("clock")), Err("clock"));
        assert!(!gate.is_awake(), "half another");
    }
}
