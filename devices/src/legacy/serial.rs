//! A 16550 serial port (`vm_superio::Serial`) on the port I/O bus.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{SerialEvents, SerialState as UartState};
use vm_superio::{Serial as Uart, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;
use crate::irq::IrqLine;

struct Line(Arc<dyn IrqLine>);

impl Trigger for Line {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.pulse();
        Ok(())
    }
}

/// Tells the owner of the port's input that there is room again.
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        // A full counter says it as well.
        let _ = self.0.write(1);
    }
}

/// Where the port's output goes. It must not block for long: a vCPU waits for it.
pub type Output = Box<dyn Write + Send>;

/// The registers, and input that the guest has not read yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Divisor latch, low and high byte.
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    input: Vec<u8>,
}

impl From<UartState> for State {
    fn from(s: UartState) -> Self {
        Self {
            divisor: [s.baud_divisor_low, s.baud_divisor_high],
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            input: s.in_buffer,
        }
    }
}

impl From<&State> for UartState {
    fn from(s: &State) -> Self {
        let [baud_divisor_low, baud_divisor_high] = s.divisor;
        Self {
            baud_divisor_low,
            baud_divisor_high,
            interrupt_enable: s.interrupt_enable,
            interrupt_identification: s.interrupt_identification,
            line_control: s.line_control,
            line_status: s.line_status,
            modem_control: s.modem_control,
            modem_status: s.modem_status,
            scratch: s.scratch,
            in_buffer: s.input.clone(),
        }
    }
}

/// A serial port.
pub struct Serial {
    uart: Mutex<Uart<Line, Drained, Output>>,
}

impl Serial {
    /// A port that interrupts through `irq`, sends what the guest writes to `output`, and signals `drained` when the
    /// guest has read all of its input.
    #[must_use]
    pub fn new(irq: Arc<dyn IrqLine>, output: Output, drained: EventFd) -> Self {
        Self { uart: Mutex::new(Uart::with_events(Line(irq), Drained(drained), output)) }
    }

    /// As [`Serial::new`], with the registers of a snapshot. An interrupt that was due is in the state of the interrupt
    /// controllers, which is taken over after this.
    ///
    /// # Errors
    /// If the state holds more input than there is room for.
    pub fn restored(irq: Arc<dyn IrqLine>, output: Output, drained: EventFd, saved: &State) -> io::Result<Self> {
        let uart = Uart::from_state(&saved.into(), Line(irq), Drained(drained), output);
        let uart = uart.map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "the saved state is damaged"))?;
        Ok(Self { uart: Mutex::new(uart) })
    }

    /// Everything, for a snapshot.
    #[must_use]
    pub fn save(&self) -> State {
        self.lock().state().into()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Uart<Line, Drained, Output>> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many bytes of input the port can take now.
    #[must_use]
    pub fn room(&self) -> usize {
        self.lock().fifo_capacity()
    }

    /// Gives the guest input, at most [`Serial::room`] bytes of it; returns how many were taken.
    pub fn input(&self, bytes: &[u8]) -> usize {
        // An error says that the FIFO is full or the interrupt was not delivered; either way nothing was taken.
        self.lock().enqueue_raw_bytes(bytes).unwrap_or(0)
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset)) {
            *value = self.lock().read(offset);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let ([value], Ok(offset)) = (data, u8::try_from(offset))
            && let Err(e) = self.lock().write(offset, *value)
        {
            log::debug!("serial output lost: {e:?}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[derive(Default)]
    struct Count(AtomicU32);
    impl IrqLine for Count {
        fn pulse(&self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[derive(Clone, Default)]
    struct Shared(Arc<Mutex<Vec<u8>>>);
    impl Write for Shared {
        fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(buf)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_goes_out_and_input_comes_in() {
        let (irq, out) = (Arc::new(Count::default()), Shared::default());
        let drained = EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let serial = Serial::new(irq.clone(), Box::new(out.clone()), drained.try_clone().unwrap());
        serial.write(0, b"h");
        serial.write(0, b"i");
        serial.write(0, b"no");
        assert_eq!(*out.0.lock().unwrap(), b"hi");
        serial.write(1, &[1]); // receive interrupts on
        assert_eq!(serial.input(b"xy"), 2);
        assert!(irq.0.load(Ordering::SeqCst) > 0);
        let mut byte = [0];
        serial.read(0, &mut byte);
        assert_eq!(byte, *b"x");
        assert!(drained.read().is_err(), "one byte is left");
        serial.read(0, &mut byte);
        assert_eq!(drained.read().unwrap(), 1);
        assert!(serial.room() > 0);
        let room = serial.room();
        assert!(room < 4096);
        assert_eq!(serial.input(&[0; 4096]), room, "no more than fits is taken");
        assert_eq!(serial.input(&[0]), 0);
    }

    #[test]
    fn input_that_was_not_read_survives_a_snapshot() {
        let event = || EventFd::new(vmm_sys_util::eventfd::EFD_NONBLOCK).unwrap();
        let line = Arc::new(Count::default());
        let port = Serial::new(line.clone(), Box::new(std::io::sink()), event());
        port.write(1, &[1]);
        assert_eq!(port.input(b"ab"), 2);
        let saved = port.save();
        let port = Serial::restored(line.clone(), Box::new(std::io::sink()), event(), &saved).unwrap();
        assert_eq!(port.save(), saved);
        let read = || {
            let mut byte = [0];
            port.read(0, &mut byte);
            byte
        };
        assert_eq!([read(), read()], [*b"a", *b"b"]);
        let flooded = State { input: vec![0; 65], ..saved };
        assert!(Serial::restored(line, Box::new(std::io::sink()), event(), &flooded).is_err());
    }
}
