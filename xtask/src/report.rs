//! What tasks print: one line per step, numbers aligned, nothing wider than 80 columns.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What has failed, in that order, and what has failed once and then passed, for [`failures`].
static FAILED: Mutex<Vec<String>> = Mutex::new(Vec::new());
static UNSTEADY: Mutex<Vec<String>> = Mutex::new(Vec::new());
/// What has ended, in that order, for [`steps`].
static ENDED: Mutex<Vec<(String, Duration)>> = Mutex::new(Vec::new());

/// Of what has failed, what is said again at the end.
const FAILURE_CHARS_MAX: usize = 600;

/// A named step; prints how long it took when it took long.
pub struct Step {
    began: Instant,
    name: String,
}

/// Announces a step.
pub fn step(name: &str) -> Step {
    println!("==> {name}");
    Step {
        began: Instant::now(),
        name: name.to_owned(),
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let took = self.began.elapsed();
        if took.as_secs() >= 2 {
            println!("    {} took {:.1} s", self.name, took.as_secs_f64());
        }
        ended(&self.name, took);
    }
}

/// Notes what is no step, but belongs into [`steps`].
pub fn ended(name: &str, took: Duration) {
    let mut ended = ENDED.lock().unwrap_or_else(PoisonError::into_inner);
    ended.push((name.to_owned(), took));
}

/// Where the time went: every step of a second and more, as a table.
pub fn steps() -> String {
    rows_of_steps(&ENDED.lock().unwrap_or_else(PoisonError::into_inner))
}

fn rows_of_steps(ended: &[(String, Duration)]) -> String {
    let long = ended.iter().filter(|(_, took)| took.as_secs() >= 1);
    let rows = long.map(|(name, took)| vec![took.as_secs().to_string(), name.clone()]);
    let title = vec!["s".to_owned(), "step".to_owned()];
    table(&std::iter::once(title).chain(rows).collect::<Vec<_>>())
}

/// Says that something has failed, now and once more at the end: what is said in between is long.
pub fn failed(words: impl AsRef<str>) {
    println!("FAILED {}", words.as_ref());
    remember_failed(words.as_ref());
}

/// The same of what has been printed already.
pub fn remember_failed(words: &str) {
    let mut failed = FAILED.lock().unwrap_or_else(PoisonError::into_inner);
    failed.push(words.to_owned());
}

/// What has failed, and passed when it was asked again.
pub fn remember_unsteady(words: &str) {
    let mut unsteady = UNSTEADY.lock().unwrap_or_else(PoisonError::into_inner);
    unsteady.push(words.to_owned());
}

/// What has failed, once or for good, one line for each, as long as a few lines of a terminal at most.
pub fn failures() -> String {
    let lines = |of: &Mutex<Vec<String>>, title: &str| -> String {
        let of = of.lock().unwrap_or_else(PoisonError::into_inner);
        of.iter().map(|words| first_words(title, words)).collect()
    };
    lines(&UNSTEADY, "unsteady, passed when asked again:") + &lines(&FAILED, "FAILED")
}

fn first_words(title: &str, words: &str) -> String {
    let line = words.lines().next().unwrap_or_default();
    let mut short: String = line.chars().take(FAILURE_CHARS_MAX).collect();
    if short.len() < words.len() {
        short.push('…');
    }
    format!("{title} {short}\n")
}

/// A line below a step.
pub fn note(words: impl AsRef<str>) {
    println!("    {}", words.as_ref());
}

/// Aligns rows by column, two spaces between columns, numbers (all digits) to the right.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|r| r.get(column))
            .map(|c| c.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::from("   ");
        for (cell, width) in row.iter().zip(&widths) {
            let number = !cell.is_empty() && cell.chars().all(|c| c.is_ascii_digit());
            line.push(' ');
            line.push_str(&if number {
                format!("{cell:>width$} ")
            } else {
                format!("{cell:<width$} ")
            });
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_that_took_no_second_are_left_out() {
        let ended = [
            ("tidy".to_owned(), Duration::from_millis(999)),
            ("tests".to_owned(), Duration::from_millis(856_700)),
        ];
        assert_eq!(rows_of_steps(&ended), "    s    step\n    856  tests\n");
    }

    #[test]
    fn a_failure_is_said_again_in_one_line_of_a_few_hundred_characters() {
        assert_eq!(
            first_words("FAILED", "vm devices: opened"),
            "FAILED vm devices: opened\n"
        );
        assert_eq!(
            first_words("FAILED", "clippy: one\ntwo"),
            "FAILED clippy: one…\n"
        );
        let long = first_words("FAILED", &"é".repeat(10_000));
        assert_eq!(
            long.chars().count(),
            "FAILED ".len() + FAILURE_CHARS_MAX + "…\n".chars().count()
        );
    }

    #[test]
    fn tables_align_words_left_and_numbers_right() {
        let rows = [
            vec!["pod".into(), "hits".into()],
            vec!["web-1".into(), "7".into()],
        ];
        assert_eq!(table(&rows), "    pod    hits\n    web-1     7\n");
    }
}
