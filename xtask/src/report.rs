//! What tasks print: one line per step, numbers aligned, nothing wider than 80 columns.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What has ended, in that order, for [`steps`].
static ENDED: Mutex<Vec<(String, Duration)>> = Mutex::new(Vec::new());

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
    fn tables_align_words_left_and_numbers_right() {
        let rows = [
            vec!["pod".into(), "hits".into()],
            vec!["web-1".into(), "7".into()],
        ];
        assert_eq!(table(&rows), "    pod    hits\n    web-1     7\n");
    }
}
