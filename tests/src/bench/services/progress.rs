//! How far it is: a bar that is drawn anew on a terminal, a line now and then elsewhere.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

const WIDTH: usize = 24;
/// Lines in a log: not one per step, but never a long silence.
const PAUSE: Duration = Duration::from_secs(10);

pub(in crate::bench) struct Progress {
    total: usize,
    done: usize,
    began: Instant,
    printed: Option<Instant>,
    is_terminal: bool,
}

impl Progress {
    pub(in crate::bench) fn new(total: usize) -> Self {
        Self {
            total,
            done: 0,
            began: Instant::now(),
            printed: None,
            is_terminal: std::io::stdout().is_terminal(),
        }
    }

    /// The next step begins.
    pub(in crate::bench) fn step(&mut self, what: &str) {
        let line = line(self.done, self.total, self.began.elapsed(), what);
        self.done += 1;
        self.show(&line);
    }

    /// Something else of the step that goes on.
    pub(in crate::bench) fn within(&mut self, what: &str) {
        let done = self.done.saturating_sub(1);
        self.show(&line(done, self.total, self.began.elapsed(), what));
    }

    fn show(&mut self, line: &str) {
        if self.is_terminal {
            print!("\r\x1b[2K{line}");
        } else if self.printed.is_none_or(|at| at.elapsed() > PAUSE) {
            println!("{line}");
            self.printed = Some(Instant::now());
        }
        // A closed pipe is found by whoever prints the figures.
        let _ = std::io::stdout().flush();
    }

    /// All is done: the bar makes room.
    pub(in crate::bench) fn end(&mut self) {
        self.done = self.total;
        let line = line(self.total, self.total, self.began.elapsed(), "");
        if self.is_terminal {
            print!("\r\x1b[2K");
        }
        println!("{}", line.trim_end());
    }
}

fn line(done: usize, total: usize, elapsed: Duration, what: &str) -> String {
    let done = done.min(total);
    let full = (WIDTH * done).checked_div(total).unwrap_or(WIDTH);
    let percent = (100 * done).checked_div(total).unwrap_or(100);
    let bar = format!("{}{}", "#".repeat(full), ".".repeat(WIDTH - full));
    let (minutes, seconds) = (elapsed.as_secs() / 60, elapsed.as_secs() % 60);
    format!("    [{bar}] {percent:>3} % {minutes:>2}:{seconds:02}  {what}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_fills_and_stays_in_its_bounds() {
        let at = |done, total| line(done, total, Duration::from_secs(75), "1000: round 1 of 5");
        assert_eq!(
            at(1, 4),
            "    [######..................]  25 %  1:15  1000: round 1 of 5"
        );
        assert!(at(9, 4).contains("########################] 100 %"));
        assert!(at(0, 0).contains("100 %"));
        let longest = line(
            1,
            2,
            Duration::from_secs(600),
            "10000: changes of iptables-legacy",
        );
        assert!(longest.len() <= 80);
    }
}
