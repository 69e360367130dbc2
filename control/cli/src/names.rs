//! How people name objects on the command line: `pods`, `po,svc`, `pod/web`, `deploy web api`.

use crate::failure::Failure;
use gantry_api::kinds::{KINDS, Kind, resolve};
use std::time::Duration;

/// One kind, and the objects meant; no names means all of them.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) kind: &'static Kind,
    pub(crate) names: Vec<String>,
}

/// Reads `TYPE[,TYPE…] [NAME…]` or `TYPE/NAME…`. `all` stands for the usual kinds.
pub(crate) fn targets(words: &[String]) -> Result<Vec<Target>, Failure> {
    let Some(first) = words.first() else {
        let text = "You must specify the type of resource to get, for example `pods`. \
                    Use \"gantry api-resources\" for a complete list of supported resources.";
        return Err(Failure::local(text));
    };
    if words.iter().any(|word| word.contains('/')) {
        let mut targets: Vec<Target> = Vec::new();
        for word in words {
            let Some((kind, name)) = word.split_once('/') else {
                let text = format!(
                    "there is no need to specify a resource type as a separate argument when \
                     passing arguments in resource/name form (found {word:?})"
                );
                return Err(Failure::local(text));
            };
            let kind = kind_of(kind)?;
            if name.is_empty() || name.contains('/') {
                let text = "arguments in resource/name form must have a single resource and name";
                return Err(Failure::local(text));
            }
            match targets.last_mut() {
                Some(last) if last.kind == kind => last.names.push(name.to_owned()),
                _ => targets.push(Target {
                    kind,
                    names: vec![name.to_owned()],
                }),
            }
        }
        return Ok(targets);
    }
    let names: Vec<String> = words[1..].to_vec();
    if first == "all" {
        let in_all = KINDS.iter().filter(|kind| kind.in_all);
        return Ok(in_all
            .map(|kind| Target {
                kind,
                names: Vec::new(),
            })
            .collect());
    }
    first
        .split(',')
        .filter(|word| !word.is_empty())
        .map(|word| {
            Ok(Target {
                kind: kind_of(word)?,
                names: names.clone(),
            })
        })
        .collect()
}

pub(crate) fn kind_of(word: &str) -> Result<&'static Kind, Failure> {
    resolve(word).ok_or_else(|| {
        let all = KINDS.iter().map(|kind| kind.plural);
        let hint = match nearest(word, all.clone()) {
            Some(plural) => format!("did you mean {plural:?}?"),
            None => format!("there are: {}", all.collect::<Vec<_>>().join(", ")),
        };
        Failure::local(format!(
            "the server doesn't have a resource type {word:?}; {hint}"
        ))
    })
}

/// The word that a typing error away from `word` would be: at most two letters differ.
fn nearest<'a>(word: &str, all: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase();
    let distances = all.map(|other| (strsim::damerau_levenshtein(&word, other), other));
    let (distance, other) = distances.min()?;
    (distance <= 2 && distance < word.len()).then_some(other)
}

/// Exactly one object: `deploy/web`, `deploy web`, or `web` where `default` is given.
pub(crate) fn one(
    words: &[String],
    default: Option<&'static Kind>,
) -> Result<(&'static Kind, String), Failure> {
    if let ([name], Some(kind)) = (words, default)
        && !name.contains('/')
    {
        return Ok((kind, name.clone()));
    }
    let mut all = targets(words)?;
    match (all.pop(), all.is_empty()) {
        (Some(Target { kind, names }), true) if names.len() == 1 => {
            Ok((kind, names.into_iter().next().unwrap_or_default()))
        }
        _ => Err(Failure::local("name one object, for example deploy/web")),
    }
}

/// Durations as Go writes them: `90s`, `5m`, `1h30m`, `500ms`; a bare number counts seconds.
pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let bad = || format!("{text:?} is no duration: use for example 30s, 5m or 1h30m");
    if let Ok(seconds) = text.parse::<u32>() {
        return Ok(Duration::from_secs(u64::from(seconds)));
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let end = rest
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .ok_or_else(bad)?;
        let number: f64 = rest[..end].parse().map_err(|_| bad())?;
        rest = &rest[end..];
        let unit_end = rest
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(rest.len());
        let unit_s = match &rest[..unit_end] {
            "ms" => 0.001,
            "s" => 1.0,
            "m" => 60.0,
            "h" => 3600.0,
            _ => return Err(bad()),
        };
        rest = &rest[unit_end..];
        let part = Duration::try_from_secs_f64(number * unit_s).map_err(|_| bad())?;
        total = total.checked_add(part).ok_or_else(bad)?;
    }
    if text.is_empty() {
        Err(bad())
    } else {
        Ok(total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_mistyped_type_is_told_with_the_one_that_was_meant() {
        let said = |word| format!("{:?}", kind_of(word).map(|kind| kind.plural));
        assert!(said("podz").contains("did you mean"), "{}", said("podz"));
        assert!(
            said("sevrices").contains("services"),
            "{}",
            said("sevrices")
        );
        assert!(said("deploymnets").contains("deployments"));
        let far = said("frobnicator");
        assert!(
            far.contains("there are") && far.contains("configmaps"),
            "{far}"
        );
    }

    #[test]
    fn every_form_is_read() {
        let read = |line: &str| -> Vec<String> {
            let shown = |t: &Target| format!("{}:{}", t.kind.plural, t.names.join("+"));
            targets(&words(line)).unwrap().iter().map(shown).collect()
        };
        assert_eq!(read("po"), ["pods:"]);
        assert_eq!(read("po,svc"), ["pods:", "services:"]);
        assert_eq!(read("deploy a b"), ["deployments:a+b"]);
        assert_eq!(read("pod/a svc/b"), ["pods:a", "services:b"]);
        assert_eq!(read("pod/a pod/b"), ["pods:a+b"]);
        assert_eq!(
            read("all"),
            [
                "pods:",
                "replicationcontrollers:",
                "services:",
                "deployments:",
                "replicasets:",
                "daemonsets:",
                "statefulsets:",
                "horizontalpodautoscalers:",
                "jobs:",
                "cronjobs:"
            ]
        );
        for line in ["", "nonsense", "pod/", "pod/a b", "pod/a/b"] {
            assert!(targets(&words(line)).is_err(), "{line}");
        }
        assert_eq!(one(&words("deploy web"), None).unwrap().1, "web");
        assert_eq!(one(&words("web"), resolve("po")).unwrap().0.plural, "pods");
        assert!(one(&words("pods"), None).is_err());
        assert!(one(&words("deploy a b"), None).is_err());
    }

    #[test]
    fn durations_are_gos() {
        for (text, ms) in [
            ("90s", 90_000),
            ("5m", 300_000),
            ("1h30m", 5_400_000),
            ("500ms", 500),
            ("7", 7_000),
            ("1.5s", 1_500),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "x", "5", "5x", "m", "-1s", "1e9h9"] {
            assert_eq!(duration(text).is_ok(), text == "5", "{text}");
        }
    }

    proptest! {
        #[test]
        fn nothing_panics(text in "\\PC{0,12}|[0-9.hms]{0,30}", line in "[a-z/, ]{0,20}") {
            let _ = duration(&text);
            let _ = targets(&words(&line));
        }
    }
}
