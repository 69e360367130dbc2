//! What tasks print: one line per step, numbers aligned, nothing wider than 80 columns.

use std::time::Instant;

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
    }
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
    fn tables_align_words_left_and_numbers_right() {
        let rows = [
            vec!["pod".into(), "hits".into()],
            vec!["web-1".into(), "7".into()],
        ];
        assert_eq!(table(&rows), "    pod    hits\n    web-1     7\n");
    }
}
