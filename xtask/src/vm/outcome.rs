//! What guests say of their scenarios, and what is done about it. Pure.
//!
//! ```text
//!  boot ─► lines ─► verdict ──► another? ──yes: told, and what failed for the first time, is left──► boot
//!                                  └──no──► passed, failed, unsteady, skipped
//! ```
//! Emulation loses time, and now and then an interrupt: there a machine that stands still is booted again
//! for what is left, and in `cargo xtask test` a scenario that fails is run once more by machines booted
//! anew. What then passes is *unsteady*: said with its first words, and counted, so that nobody takes it
//! for steady. On true processors nothing is run twice.

use crate::report;

/// How often the machines of a set are booted, at most.
pub const BOOTS_MAX: usize = 3;

/// A scenario that failed, or the machine itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    name: String,
    /// In a line, with the name.
    pub words: String,
}

/// What the guests of a set of scenarios reported.
#[derive(Default)]
pub struct Outcome {
    /// Scenarios that passed.
    pub passed: usize,
    /// What failed, also when asked again.
    pub failed: Vec<Failure>,
    /// What failed once, and passed when asked again.
    pub unsteady: Vec<Failure>,
    /// Reasons.
    pub skipped: Vec<String>,
    /// What was measured, as JSON.
    pub figures: Option<String>,
    /// The guests have come to their end.
    pub ended: bool,
    /// Scenarios that passed or were skipped.
    told: Vec<String>,
}

/// How a boot went, beside its verdicts.
#[derive(Clone, Copy)]
pub struct Boot {
    /// From 1 on.
    pub number: usize,
    /// An emulated processor stood still.
    pub is_still: bool,
    /// What fails is asked again.
    pub repeats: bool,
}

impl Outcome {
    /// Reads one line of a guest's console.
    pub fn verdict(&mut self, line: &str) {
        let Some((_, words)) = line.split_once("vm: ") else {
            return;
        };
        if let Some(name) = words.strip_prefix("ok ") {
            report::note(format!("ok {name}"));
            self.told.push(name_in(name));
            self.passed += 1;
        } else if words.starts_with("so far ") {
            report::note(words);
        } else if let Some(words) = words.strip_prefix("FAILED ") {
            println!("FAILED vm {words}");
            self.fail(words);
        } else if let Some(reason) = words.strip_prefix("skipped ") {
            self.told.push(name_in(reason));
            self.skipped.push(format!("vm {reason}"));
        } else if let Some(figures) = words.strip_prefix("figures ") {
            self.figures = Some(figures.trim().to_owned());
        } else if words.trim() == "end" {
            self.ended = true;
        }
    }

    /// Something has failed, in words that begin with its name.
    pub fn fail(&mut self, words: &str) {
        self.failed.push(Failure {
            name: name_in(words),
            words: format!("vm {}", words.trim()),
        });
    }

    /// What is not to be run by the next boot, for the kernel's command line.
    pub fn told(&self) -> String {
        let failed = self.failed.iter().map(|failure| &failure.name);
        let names: Vec<&str> = self.told.iter().chain(failed).map(String::as_str).collect();
        names.join(",")
    }

    /// Whether another boot is worth it after this one; what it is to repeat is no failure until then.
    pub fn another(&mut self, boot: Boot) -> bool {
        let is_last = boot.number >= BOOTS_MAX;
        let mut is_repeated = false;
        if boot.repeats && !is_last {
            let (before, now) = (self.unsteady.clone(), std::mem::take(&mut self.failed));
            for failure in now {
                if before.iter().any(|known| known.name == failure.name) {
                    self.failed.push(failure);
                } else {
                    self.unsteady.push(failure);
                    is_repeated = true;
                }
            }
        }
        let another = is_repeated || (boot.is_still && !is_last);
        if !another {
            let failed = &self.failed;
            self.unsteady
                .retain(|once| failed.iter().all(|failure| failure.name != once.name));
            if !self.ended {
                self.fail("machines: no end");
            }
        }
        self.ended &= !another;
        another
    }

    /// Adds those of another set of scenarios.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed.extend(other.failed);
        self.unsteady.extend(other.unsteady);
        self.skipped.extend(other.skipped);
    }

    /// Tells what is said at the end of everything.
    pub fn report(&self) {
        for failure in &self.failed {
            report::remember_failed(&failure.words);
        }
        for once in &self.unsteady {
            report::remember_unsteady(&once.words);
        }
    }
}

/// The name of a scenario that a verdict begins with.
fn name_in(words: &str) -> String {
    let name = words.split([' ', ':']).next().unwrap_or_default();
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(lines: &[&str]) -> Outcome {
        let mut outcome = Outcome::default();
        lines.iter().for_each(|line| outcome.verdict(line));
        outcome
    }

    fn boot(number: usize) -> Boot {
        Boot {
            number,
            is_still: false,
            repeats: true,
        }
    }

    fn names(failures: &[Failure]) -> Vec<&str> {
        failures.iter().map(|one| one.name.as_str()).collect()
    }

    #[test]
    fn verdicts_are_read_from_a_noisy_console() {
        let mut outcome = after(&[
            "[    1.2] something",
            "vm: ok main-job 12.1 s",
            "[    9.9] vm: FAILED devices: opened /dev/ttyS0",
            "vm: skipped ipv6: no module",
            "vm: so far 20 tests in 9 s",
        ]);
        assert_eq!((outcome.passed, outcome.ended), (1, false));
        assert_eq!(names(&outcome.failed), ["devices"]);
        assert_eq!(outcome.failed[0].words, "vm devices: opened /dev/ttyS0");
        assert_eq!(outcome.skipped, ["vm ipv6: no module"]);
        assert_eq!(outcome.told(), "main-job,ipv6,devices");
        outcome.verdict("vm: end");
        assert!(outcome.ended);
    }

    #[test]
    fn a_failure_is_asked_again_once_and_then_unsteady_or_failed() {
        let first = [
            "vm: ok a 1 s",
            "vm: FAILED b: x",
            "vm: FAILED c: y",
            "vm: end",
        ];
        let mut outcome = after(&first);
        assert!(outcome.another(boot(1)));
        assert_eq!((outcome.told(), outcome.ended), ("a".to_owned(), false));
        for line in ["vm: ok b 2 s", "vm: FAILED c: z", "vm: end"] {
            outcome.verdict(line);
        }
        assert!(!outcome.another(boot(2)));
        assert_eq!(
            (names(&outcome.failed), names(&outcome.unsteady)),
            (vec!["c"], vec!["b"])
        );
        assert_eq!(outcome.unsteady[0].words, "vm b: x");
        assert_eq!((outcome.passed, outcome.ended), (2, true));
    }

    #[test]
    fn without_repetition_a_failure_is_one_at_once() {
        let mut outcome = after(&["vm: FAILED b: x", "vm: end"]);
        let once = Boot {
            repeats: false,
            ..boot(1)
        };
        assert!(!outcome.another(once));
        assert_eq!(
            (names(&outcome.failed), outcome.unsteady.len()),
            (vec!["b"], 0)
        );
    }

    #[test]
    fn a_machine_that_stands_still_is_booted_for_what_is_left_but_not_for_ever() {
        let still = |number| Boot {
            is_still: true,
            repeats: false,
            ..boot(number)
        };
        let mut outcome = after(&["vm: ok a 1 s", "vm: FAILED b: x"]);
        assert!(outcome.another(still(1)));
        assert_eq!(outcome.told(), "a,b");
        assert!(outcome.another(still(2)));
        assert!(!outcome.another(still(BOOTS_MAX)));
        assert_eq!(names(&outcome.failed), ["b", "machines"]);
    }

    #[test]
    fn machines_that_come_to_no_end_have_failed() {
        let mut outcome = after(&["vm: ok a 1 s"]);
        let no_reason = Boot {
            repeats: false,
            ..boot(1)
        };
        assert!(!outcome.another(no_reason));
        assert_eq!(names(&outcome.failed), ["machines"]);
    }

    #[test]
    fn what_fails_in_the_last_boot_has_failed() {
        let mut outcome = after(&["vm: FAILED b: x", "vm: end"]);
        assert!(!outcome.another(boot(BOOTS_MAX)));
        assert_eq!(
            (names(&outcome.failed), outcome.unsteady.len()),
            (vec!["b"], 0)
        );
    }
}
