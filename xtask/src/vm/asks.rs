//! What the scenarios ask the machine below for: faults that no program inside can make.
//!
//! ```text
//!  guest of node-1: "ask 7 power-cut node-2" ─► serial port ─► parse ─► the switch, or a QEMU
//!                   "7 ok" or "7 error WORDS" ◄──────────────┘
//! ```
//! One line each way. Parsing is pure and total: a guest says anything.

use std::time::Duration;

/// One request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// The machine stops at once: no byte more is written by it.
    PowerCut(usize),
    /// The machine starts, with the disk that it has.
    PowerOn(usize),
    /// Nothing passes between that machine and any other.
    Isolate(usize),
    /// Nothing passes between the two.
    Cut(usize, usize),
    /// Frames to that machine take longer.
    Delay(usize, Duration),
    /// So many of a hundred frames of that machine are lost.
    Lose(usize, u32),
    /// No faults any more.
    Heal,
    /// A scenario begins: the capture begins anew.
    Begin,
    /// That scenario has failed: what has passed the switch is written to a file.
    Capture(String),
    /// Whether these words have passed the switch, in one frame, since the scenario began.
    Passed(String),
    /// How the control plane is reached, for whoever asks from the host: base64 of a kubeconfig.
    Kubeconfig(String),
}

/// Reads `ask NUMBER WORDS...`; machines are `node-1` to `node-COUNT` and become 0 to COUNT - 1. The
/// number comes back with what is wrong.
pub fn parse(line: &str, count: usize) -> Option<(u32, Result<Ask, String>)> {
    let mut words = line.split_whitespace();
    if words.next() != Some("ask") {
        return None;
    }
    let number = words.next()?.parse().ok()?;
    let words: Vec<&str> = words.collect();
    Some((number, ask(&words, count)))
}

fn ask(words: &[&str], count: usize) -> Result<Ask, String> {
    let node = |name: &str| {
        let number = name
            .strip_prefix("node-")
            .and_then(|n| n.parse::<usize>().ok());
        let index = number.and_then(|n| n.checked_sub(1)).filter(|n| *n < count);
        index.ok_or_else(|| format!("{name} is none of node-1 to node-{count}"))
    };
    let figure = |word: &str| {
        word.parse::<u32>()
            .map_err(|error| format!("{word}: {error}"))
    };
    Ok(match *words {
        ["power-cut", name] => Ask::PowerCut(node(name)?),
        ["power-on", name] => Ask::PowerOn(node(name)?),
        ["isolate", name] => Ask::Isolate(node(name)?),
        ["cut", a, b] => Ask::Cut(node(a)?, node(b)?),
        ["delay", name, ms] => Ask::Delay(
            node(name)?,
            Duration::from_millis(figure(ms)?.min(10_000).into()),
        ),
        ["lose", name, percent] => Ask::Lose(node(name)?, figure(percent)?),
        ["heal"] => Ask::Heal,
        ["begin"] => Ask::Begin,
        ["capture", name] => {
            let is_plain = |c: char| c.is_ascii_alphanumeric() || c == '-';
            let is_name = name.chars().all(is_plain);
            is_name
                .then(|| Ask::Capture(name.into()))
                .ok_or("no name")?
        }
        ["passed", words] => Ask::Passed(words.into()),
        ["kubeconfig", base64] => Ask::Kubeconfig(base64.into()),
        _ => return Err(format!("nobody knows how to {}", words.join(" "))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn asks_are_read_with_their_number() {
        let read = |line| parse(line, 3);
        assert_eq!(
            read("ask 7 power-cut node-2"),
            Some((7, Ok(Ask::PowerCut(1))))
        );
        assert_eq!(
            read("ask 8 delay node-3 250\r"),
            Some((8, Ok(Ask::Delay(2, Duration::from_millis(250)))))
        );
        assert_eq!(
            read("ask 9 cut node-1 node-3"),
            Some((9, Ok(Ask::Cut(0, 2))))
        );
        assert_eq!(read("ask 10 heal"), Some((10, Ok(Ask::Heal))));
        assert_eq!(
            read("ask 12 passed secret"),
            Some((12, Ok(Ask::Passed("secret".into()))))
        );
        assert_eq!(
            read("ask 11 capture nodes-reach"),
            Some((11, Ok(Ask::Capture("nodes-reach".into()))))
        );
    }

    #[test]
    fn what_is_none_is_refused_with_words_or_ignored() {
        for line in [
            "ask 1 power-cut node-0",
            "ask 1 power-cut node-4",
            "ask 1 power-cut node-99999999999999999999",
            "ask 1 lose node-1 -3",
            "ask 1 capture ../../escape",
            "ask 1 dance",
            "ask 1",
        ] {
            assert!(matches!(parse(line, 3), Some((1, Err(_)))), "{line}");
        }
        for line in ["", "ask", "ask x heal", "login: ", "askew 1 heal"] {
            assert_eq!(parse(line, 3), None, "{line}");
        }
    }
}
