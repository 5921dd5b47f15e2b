//! A filter as a program of classic BPF (Documentation/userspace-api/seccomp_filter.rst): a search tree over the calls'
//! numbers.
//!
//! The kernel runs a new filter once for every number there is, to know which are allowed whatever their arguments
//! (`seccomp_cache_prepare` in kernel/seccomp.c), and each thread of a starting VMM installs one: a path of a dozen
//! instructions instead of a list's hundreds is what makes that cheap.

use std::collections::BTreeMap;
use std::process;

use seccompiler::{BpfProgram, sock_filter};

use super::table::Test;

/// What becomes of a call: `SECCOMP_RET_*` of linux/seccomp.h, with its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Action(u32);

impl Action {
    pub const ALLOW: Self = Self(libc::SECCOMP_RET_ALLOW);
    pub const LOG: Self = Self(libc::SECCOMP_RET_LOG);
    pub const TRAP: Self = Self(libc::SECCOMP_RET_TRAP);
    /// There is no such call.
    pub const REFUSE: Self = Self(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned());
    const KILL: Self = Self(libc::SECCOMP_RET_KILL_PROCESS);
}

/// What becomes of the calls with one number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Whatever the arguments.
    Always(Action),
    /// Allowed if all tests of one alternative hold.
    AllowIf(Vec<&'static [Test]>),
}

/// The program that answers by `verdicts`, and with `otherwise` where they say nothing.
pub(super) fn assemble(verdicts: &BTreeMap<u32, Verdict>, otherwise: Action) -> BpfProgram {
    let other = Verdict::Always(otherwise);
    let mut ranges: Vec<(u32, &Verdict)> = vec![(0, &other)];
    for (number, verdict) in verdicts {
        // The range before it ends here, if it begins here it is empty.
        ranges.pop_if(|(start, _)| start == number);
        ranges.push((*number, verdict));
        ranges.extend(number.checked_add(1).map(|next| (next, &other)));
    }
    ranges.dedup_by(|next, previous| next.1 == previous.1);
    let mut program = vec![load(ARCHITECTURE_AT), jump(libc::BPF_JEQ, architecture(), 1, 0), answer(Action::KILL)];
    program.push(load(NUMBER_AT));
    program.extend(search(&ranges, otherwise));
    program
}

/// Stands for the id of the process that will install a program; no process has it, nor does a table test for it.
const OWN_PROCESS: u32 = u32::MAX - 1;

/// A program of [`assemble`] for this process: programs are made once, and a forked process has another id.
pub(super) fn for_this_process(program: &[sock_filter]) -> BpfProgram {
    let own = process::id();
    let named = |i: &sock_filter| sock_filter { k: if i.k == OWN_PROCESS { own } else { i.k }, ..i.clone() };
    program.iter().map(named).collect()
}

/// Finds the range a number is in, the last one whose start is not above it.
fn search(ranges: &[(u32, &Verdict)], otherwise: Action) -> BpfProgram {
    let (low, high) = ranges.split_at(ranges.len() / 2);
    let [(pivot, verdict), ..] = high else { return vec![answer(otherwise)] };
    if low.is_empty() {
        return match verdict {
            Verdict::Always(action) => vec![answer(*action)],
            Verdict::AllowIf(alternatives) => tests(alternatives, otherwise),
        };
    }
    let (low, high) = (search(low, otherwise), search(high, otherwise));
    let mut program = match u8::try_from(low.len()) {
        Ok(distance) => vec![jump(libc::BPF_JGE, *pivot, distance, 0)],
        // Too far for a conditional jump.
        Err(_) => vec![
            jump(libc::BPF_JGE, *pivot, 0, 1),
            instruction(libc::BPF_JMP | libc::BPF_JA, u32::try_from(low.len()).unwrap_or(u32::MAX)),
        ],
    };
    program.extend(low);
    program.extend(high);
    program
}

/// Allows what fits one of `alternatives`.
fn tests(alternatives: &[&[Test]], otherwise: Action) -> BpfProgram {
    let mut program = Vec::new();
    for tests in alternatives {
        // From the last to the first: each jumps over what follows it if it does not hold.
        let mut alternative = vec![answer(Action::ALLOW)];
        for test in tests.iter().rev() {
            let (argument, mask, value) = match *test {
                Test::Masked(argument, mask, value) => (argument, mask, value),
                Test::OwnProcess(argument) => (argument, u32::MAX, OWN_PROCESS),
            };
            let mut one = vec![load(ARGUMENTS_AT + 8 * u32::from(argument) + LOW_HALF)];
            if mask != u32::MAX {
                one.push(instruction(libc::BPF_ALU | libc::BPF_AND | libc::BPF_K, mask));
            }
            // Tables have a handful of tests for a call: a distance that does not fit would be refused by the kernel.
            one.push(jump(libc::BPF_JEQ, value, 0, u8::try_from(alternative.len()).unwrap_or(u8::MAX)));
            one.append(&mut alternative);
            alternative = one;
        }
        program.append(&mut alternative);
    }
    program.push(answer(otherwise));
    program
}

/// Offsets in `struct seccomp_data`.
const NUMBER_AT: u32 = 0;
const ARCHITECTURE_AT: u32 = 4;
const ARGUMENTS_AT: u32 = 16;
/// Where the lower 32 bits of an argument are.
const LOW_HALF: u32 = if cfg!(target_endian = "big") { 4 } else { 0 };

/// `AUDIT_ARCH_*` of linux/audit.h: calls by another architecture's convention (32-bit ones) have other numbers.
fn architecture() -> u32 {
    const X86_64: u32 = 0xc000_003e;
    const AARCH64: u32 = 0xc000_00b7;
    if std::env::consts::ARCH == "aarch64" { AARCH64 } else { X86_64 }
}

fn instruction(code: u32, k: u32) -> sock_filter {
    sock_filter { code: u16::try_from(code).unwrap_or(u16::MAX), jt: 0, jf: 0, k }
}

fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, offset)
}

fn answer(action: Action) -> sock_filter {
    instruction(libc::BPF_RET | libc::BPF_K, action.0)
}

fn jump(test: u32, k: u32, jt: u8, jf: u8) -> sock_filter {
    sock_filter { jt, jf, ..instruction(libc::BPF_JMP | test | libc::BPF_K, k) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The half of an argument that is looked at.
    fn low(argument: u64) -> u32 {
        u32::try_from(argument & 0xffff_ffff).unwrap()
    }

    /// What the kernel would do: the answer, and after how many instructions.
    fn run(program: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> (Action, usize) {
        let (mut at, mut accumulator) = (0, 0);
        for count in 1.. {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let branch = |taken| usize::from(if taken { jt } else { jf });
            match u32::from(code) {
                c if c == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    accumulator = match k {
                        0 => number,
                        4 => architecture,
                        16.. if k % 8 == 0 => low(arguments[usize::try_from(k / 8 - 2).unwrap()]),
                        _ => panic!("load from {k}"),
                    }
                }
                c if c == libc::BPF_ALU | libc::BPF_AND | libc::BPF_K => accumulator &= k,
                c if c == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => at += branch(accumulator == k),
                c if c == libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K => at += branch(accumulator >= k),
                c if c == libc::BPF_JMP | libc::BPF_JA => at += usize::try_from(k).unwrap(),
                c if c == libc::BPF_RET | libc::BPF_K => return (Action(k), count),
                other => panic!("instruction {other:#x}"),
            }
        }
        unreachable!()
    }

    const TWO: &[Test] = &[Test::Masked(0, 0xff00, 0xae00), Test::Masked(2, u32::MAX, 7)];
    const ONE: &[Test] = &[Test::Masked(1, 1, 0)];

    fn verdicts() -> BTreeMap<u32, Verdict> {
        let mut all: BTreeMap<u32, Verdict> =
            (0..450).filter(|n| n % 3 == 0 || n % 7 == 0).map(|n| (n, Verdict::Always(Action::ALLOW))).collect();
        // Long enough for a jump that no byte holds.
        all.extend((100..200).map(|n| (n, Verdict::AllowIf(vec![TWO, ONE]))));
        all.extend([(5, Verdict::Always(Action::REFUSE)), (6, Verdict::Always(Action::REFUSE))]);
        all.insert(u32::MAX, Verdict::Always(Action::ALLOW));
        all
    }

    fn expected(verdict: Option<&Verdict>, arguments: [u64; 6]) -> Action {
        let holds = |test: &Test| match *test {
            Test::Masked(argument, mask, value) => low(arguments[usize::from(argument)]) & mask == value,
            Test::OwnProcess(argument) => low(arguments[usize::from(argument)]) == process::id(),
        };
        match verdict {
            Some(Verdict::Always(action)) => *action,
            Some(Verdict::AllowIf(all)) if all.iter().any(|tests| tests.iter().all(holds)) => Action::ALLOW,
            _ => Action::TRAP,
        }
    }

    #[test]
    fn every_number_gets_its_answer() {
        let verdicts = verdicts();
        let program = assemble(&verdicts, Action::TRAP);
        let high = 0xffff_ffff_0000_0000;
        for number in (0..600).chain([0x4000_0000, 0x4000_0003, u32::MAX - 1, u32::MAX]) {
            for arguments in
                [[0; 6], [0xae80, 1, 7, 0, 0, 0], [0xae80, 1, 8, 0, 0, 0], [high | 0xae00, high | 1, 7, 0, 0, 0]]
            {
                let answer = run(&program, architecture(), number, arguments).0;
                assert_eq!(answer, expected(verdicts.get(&number), arguments), "{number} {arguments:x?}");
            }
        }
    }

    #[test]
    fn another_architecture_ends_the_process() {
        let program = assemble(&verdicts(), Action::TRAP);
        assert_eq!(run(&program, 0x4000_0003, 0, [0; 6]).0, Action::KILL);
    }

    #[test]
    fn the_own_process_is_this_one() {
        const OWN: &[Test] = &[Test::OwnProcess(0)];
        let program = assemble(&BTreeMap::from([(9, Verdict::AllowIf(vec![OWN]))]), Action::TRAP);
        let program = for_this_process(&program);
        let me = u64::from(process::id());
        assert_eq!(run(&program, architecture(), 9, [me, 0, 0, 0, 0, 0]).0, Action::ALLOW);
        assert_eq!(run(&program, architecture(), 9, [me + 1, 0, 0, 0, 0, 0]).0, Action::TRAP);
    }

    #[test]
    fn the_way_to_an_answer_is_short() {
        let program = assemble(&verdicts(), Action::TRAP);
        let longest = (0..600).map(|number| run(&program, architecture(), number, [0; 6]).1).max();
        assert!(longest < Some(28), "{longest:?}");
    }

    #[test]
    fn nothing_at_all_is_a_program_too() {
        let program = assemble(&BTreeMap::new(), Action::LOG);
        assert_eq!(run(&program, architecture(), 0, [0; 6]).0, Action::LOG);
    }
}
