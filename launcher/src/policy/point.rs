//! Where requests of a VM are decided.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    ask::{Answer, Ask, Desktop, Question},
    record::Record,
    rules::{Action, Policy, Service},
};
use crate::{home::HomeError, places::Places};

/// How long a question waits for its answer.
pub const TIME_TO_ANSWER: Duration = Duration::from_secs(30);

/// How long nothing is asked about a VM after a question that was not answered with yes.
const SILENCE: Duration = Duration::from_secs(10);

/// Requests of one VM that are decided in a second. More are denied unseen, or they would fill the log.
const AT_ONCE: u32 = 20;

/// Longest target, in bytes.
const LONGEST_TARGET: usize = 4096;

/// What was decided, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// Whether it may be done.
    pub allowed: bool,
    /// The rule with its place and what the user said, or what else stood against it. It is for the user, not for the VM: there
    /// are paths of the host in it.
    pub because: String,
}

/// Decides what one VM asks for. The policy is read anew each time, so that a change of it counts at once.
pub struct DecisionPoint {
    app: String,
    places: Places,
    record: Result<Record, HomeError>,
    ask: Box<dyn Ask>,
    time: Duration,
    state: Mutex<State>,
}

/// What there was before.
#[derive(Debug)]
struct State {
    /// Begin of the second in which `decided` requests were decided.
    second: Instant,
    decided: u32,
    /// Requests that were denied unseen, not in the log yet.
    unseen: u64,
    asking: bool,
    silent_until: Option<Instant>,
    /// What the user allowed for the VM's lifetime.
    remembered: Vec<(Service, String)>,
}

impl DecisionPoint {
    /// For a VM that runs `app`. Questions are asked on the desktop and wait for [`TIME_TO_ANSWER`].
    pub fn new(places: Places, app: &str) -> Self {
        Self::with(places, app, Box::new(Desktop), TIME_TO_ANSWER)
    }

    /// The same with another time for answers.
    pub fn with_time(places: Places, app: &str, time: Duration) -> Self {
        Self::with(places, app, Box::new(Desktop), time)
    }

    fn with(places: Places, app: &str, ask: Box<dyn Ask>, time: Duration) -> Self {
        let state = State {
            second: Instant::now(),
            decided: 0,
            unseen: 0,
            asking: false,
            silent_until: None,
            remembered: Vec::new(),
        };
        let record = places.state().map(Record::new);
        Self { app: app.into(), places, record, ask, time, state: Mutex::new(state) }
    }

    /// The app that this is about.
    pub fn app(&self) -> &str {
        &self.app
    }

    /// Decides whether the VM may have `service` of `target`, which may be anything, and writes it down. Waits for the user where
    /// the policy says so: not to be called where something else waits for this thread.
    pub fn decide(&self, service: Service, target: &str) -> Verdict {
        self.decide_by(service, target, || self.question(service, target))
    }

    /// The same for a target that the user has chosen, in the dialog that the VM asked for: that is the answer where the policy
    /// asks.
    pub fn decide_chosen(&self, service: Service, target: &str) -> Verdict {
        self.decide_by(service, target, || (true, "the user has chosen it".into()))
    }

    /// The same for a target that the user chose for a former VM with this home directory. The VM does not ask for it, so it is
    /// none of its requests.
    pub fn decide_remembered(&self, service: Service, target: &str) -> Verdict {
        self.decide_admitted(service, target, 0, || (true, "the user has chosen it for a VM before".into()))
    }

    fn decide_by(&self, service: Service, target: &str, answer: impl FnOnce() -> (bool, String)) -> Verdict {
        match self.admit() {
            Ok(unseen) => self.decide_admitted(service, target, unseen, answer),
            Err(verdict) => verdict,
        }
    }

    fn decide_admitted(
        &self,
        service: Service,
        target: &str,
        unseen: u64,
        answer: impl FnOnce() -> (bool, String),
    ) -> Verdict {
        let verdict = if target.len() > LONGEST_TARGET {
            deny(format!("the target has more than {LONGEST_TARGET} bytes"))
        } else {
            match Policy::load(&self.places) {
                Ok(policy) => self.by(&policy, service, target, answer),
                Err(error) => deny(format!("the policy has a mistake, and denies all until it is mended: {error}")),
            }
        };
        self.write_down(service, target, unseen, verdict)
    }

    /// Counts the request. Gives how many were denied unseen before it.
    fn admit(&self) -> Result<u64, Verdict> {
        let mut state = self.lock();
        if state.second.elapsed() >= Duration::from_secs(1) {
            (state.second, state.decided) = (Instant::now(), 0);
        }
        if state.decided >= AT_ONCE {
            state.unseen = state.unseen.saturating_add(1);
            return Err(deny(format!("there were {AT_ONCE} requests in this second already")));
        }
        state.decided += 1;
        Ok(std::mem::take(&mut state.unseen))
    }

    fn by(&self, policy: &Policy, service: Service, target: &str, answer: impl FnOnce() -> (bool, String)) -> Verdict {
        let decision = policy.decide(service, &self.app, target);
        match decision.action {
            Action::Allow => Verdict { allowed: true, because: decision.because },
            Action::Deny => deny(decision.because),
            Action::Ask => {
                let (allowed, how) = answer();
                Verdict { allowed, because: format!("{}; {how}", decision.because) }
            }
        }
    }

    /// Asks the user, one question at a time.
    fn question(&self, service: Service, target: &str) -> (bool, String) {
        {
            let mut state = self.lock();
            if state.remembered.iter().any(|(own, what)| *own == service && what == target) {
                return (true, "the user has allowed it until the VM ends".into());
            }
            if state.asking {
                return (false, "not asked: another question is open".into());
            }
            if state.silent_until.is_some_and(|end| Instant::now() < end) {
                return (false, format!("not asked: less than {} s after the last no", SILENCE.as_secs()));
            }
            state.asking = true;
        }
        let answer = self.ask_alone(service, target);
        let mut state = self.lock();
        state.asking = false;
        let (allowed, how) = match answer {
            Ok(Answer::Once) => (true, "the user allowed it".into()),
            Ok(Answer::UntilItEnds) => {
                state.remembered.push((service, target.into()));
                (true, "the user allowed it until the VM ends".into())
            }
            Ok(Answer::No) => (false, "the user denied it".into()),
            Ok(Answer::None) => (false, format!("the user did not answer in {} s", self.time.as_secs())),
            Err(error) => (false, format!("not asked: {error}")),
        };
        if !allowed {
            state.silent_until = Some(Instant::now() + SILENCE);
        }
        (allowed, how)
    }

    fn ask_alone(&self, service: Service, target: &str) -> Result<Answer, String> {
        let record = self.record.as_ref().map_err(ToString::to_string)?;
        let turn = record.turn_to_ask(&self.app).map_err(|error| format!("cannot take turns: {error}"))?;
        let _turn = turn.ok_or("another VM of this app asks")?;
        let question = Question::new(&self.app, service, target, self.time);
        self.ask.ask(&question, self.time).map_err(|error| error.to_string())
    }

    /// What cannot be written down is not allowed.
    fn write_down(&self, service: Service, target: &str, unseen: u64, verdict: Verdict) -> Verdict {
        let word = if verdict.allowed { Action::Allow } else { Action::Deny };
        // What an application names is quoted: it could be a line of its own in the log.
        let target: String = target.chars().take(LONGEST_TARGET / 4).collect();
        let because = verdict.because.replace(char::is_control, " ");
        let line = format!("{word} {service} {:?} {target:?} ({because})", self.app);
        log::info!(target: "policy", "{line}");
        let before = format!("deny {unseen} requests of {:?} unseen, there were too many at once", self.app);
        let written = self.record.as_ref().map_err(ToString::to_string).and_then(|record| {
            if unseen > 0 {
                record.append(&before).map_err(|error| error.to_string())?;
            }
            record.append(&line).map_err(|error| error.to_string())
        });
        match written {
            Ok(()) => verdict,
            Err(error) => deny(format!("it cannot be written to the log: {error}")),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No state is left half-way when a thread panics.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn deny(because: String) -> Verdict {
    Verdict { allowed: false, because }
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc, thread};

    use super::{super::ask::AskError, *};

    /// Gives each question to the test, and the test's answer back.
    type Asked = (Question, mpsc::Sender<Answer>);

    struct Teller(Mutex<mpsc::Sender<Asked>>);

    impl Ask for Teller {
        fn ask(&self, question: &Question, _: Duration) -> Result<Answer, AskError> {
            let (tell, answer) = mpsc::channel();
            self.0.lock().unwrap().send((question.clone(), tell)).unwrap();
            Ok(answer.recv().unwrap())
        }
    }

    struct Fixture {
        folder: tempfile::TempDir,
        point: DecisionPoint,
        questions: mpsc::Receiver<Asked>,
    }

    fn fixture(policy: &str) -> Fixture {
        let folder = tempfile::tempdir().unwrap();
        let places = Places::at(folder.path());
        let file = places.policies().next().unwrap();
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, policy).unwrap();
        let (tell, questions) = mpsc::channel();
        let ask = Box::new(Teller(Mutex::new(tell)));
        let point = DecisionPoint::with(places, "mail", ask, Duration::from_secs(9));
        Fixture { folder, point, questions }
    }

    impl Fixture {
        fn log(&self) -> Vec<String> {
            let text = fs::read_to_string(self.folder.path().join("state/policy.log")).unwrap();
            text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
        }

        /// Decides while the test gives this answer.
        fn answered(&self, target: &str, answer: Answer) -> Verdict {
            thread::scope(|scope| {
                let point = &self.point;
                let verdict = scope.spawn(|| point.decide(Service::Exec, target));
                let asked = self.questions.recv_timeout(Duration::from_secs(60)).expect("the user is asked");
                asked.1.send(answer).unwrap();
                verdict.join().unwrap()
            })
        }

        /// The silence after a no is over.
        fn later(&self) {
            self.point.lock().silent_until = None;
        }
    }

    #[test]
    fn allowed_denied_and_written_down_with_the_rule() {
        let fixture = fixture("open-url mail https://* allow\n* mail * deny\n");
        let file = fixture.folder.path().join("user/policy");
        assert!(fixture.point.decide(Service::OpenUrl, "https://x.org").allowed);
        assert!(!fixture.point.decide(Service::OpenUrl, "a\nallow exec \u{202e}").allowed);
        let rule = |line, rule: &str| format!("({}:{line}: {rule})", file.display());
        let expected = [
            format!("allow open-url \"mail\" \"https://x.org\" {}", rule(1, "open-url mail https://* allow")),
            format!("deny open-url \"mail\" \"a\\nallow exec \\u{{202e}}\" {}", rule(2, "* mail * deny")),
        ];
        assert_eq!(fixture.log(), expected);
        // A change counts at once, a mistake too.
        fs::write(&file, "open-url mail * allow\nopen-url mail * alow\n").unwrap();
        let verdict = fixture.point.decide(Service::OpenUrl, "https://x.org");
        assert!(!verdict.allowed && verdict.because.contains("/policy:2:17: unknown action"), "{verdict:?}");
        assert!(!fixture.point.decide(Service::OpenUrl, &"x".repeat(5000)).allowed);
        assert!(fixture.log().iter().all(|line| line.len() < 2000));
    }

    #[test]
    fn the_user_is_asked_and_may_be_asked_again() {
        let fixture = fixture("exec mail vault:* ask\n");
        for (answer, allowed, how) in [
            (Answer::Once, true, "the user allowed it"),
            (Answer::No, false, "the user denied it"),
            (Answer::None, false, "the user did not answer in 9 s"),
            (Answer::UntilItEnds, true, "the user allowed it until the VM ends"),
        ] {
            let verdict = fixture.answered("vault:a", answer);
            assert_eq!(verdict.allowed, allowed);
            assert!(verdict.because.ends_with(&format!("exec mail vault:* ask; {how}")), "{verdict:?}");
            fixture.later();
        }
        // Remembered, of this target and while the rule says that the user decides.
        let verdict = fixture.point.decide(Service::Exec, "vault:a");
        assert!(verdict.allowed && verdict.because.ends_with("the user has allowed it until the VM ends"));
        assert!(!fixture.answered("vault:b", Answer::No).allowed);
        fs::write(fixture.folder.path().join("user/policy"), "exec mail vault:* deny\n").unwrap();
        assert!(!fixture.point.decide(Service::Exec, "vault:a").allowed);
        assert_eq!(fixture.log().len(), 7);
    }

    #[test]
    fn a_flood_of_requests_is_one_question() {
        let fixture = fixture("exec mail * ask\n");
        thread::scope(|scope| {
            let point = &fixture.point;
            let first = scope.spawn(|| point.decide(Service::Exec, "vault:a"));
            let (question, answer) = fixture.questions.recv().unwrap();
            assert!(question.details == "App: mail\nService: exec\nTarget: \u{201c}vault:a\u{201d}", "{question:?}");
            for number in 1..100 {
                assert!(!fixture.point.decide(Service::Exec, &format!("vault:{number}")).allowed);
            }
            answer.send(Answer::No).unwrap();
            assert!(!first.join().unwrap().allowed);
        });
        assert!(!fixture.point.decide(Service::Exec, "vault:a").allowed);
        assert!(fixture.questions.try_recv().is_err(), "it was asked again");
        let log = fixture.log();
        let unasked = log.iter().filter(|line| line.contains("not asked: another question is open")).count();
        assert!((19..60).contains(&unasked), "{log:?}");
        let again = log.iter().any(|line| line.contains("unseen, there were too many at once"));
        // The last decision may have been in the same second, and unseen, too.
        assert!(again || fixture.point.lock().unseen > 0, "{log:?}");
    }

    #[test]
    fn what_cannot_be_written_down_is_denied() {
        let fixture = fixture("* * * allow\n");
        fs::write(fixture.folder.path().join("state"), "no folder").unwrap();
        let verdict = fixture.point.decide(Service::Files, "/x");
        assert!(!verdict.allowed && verdict.because.contains("cannot be written to the log"), "{verdict:?}");
    }
}
