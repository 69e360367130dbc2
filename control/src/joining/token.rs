//! Whether a token lets a machine in: pure, over the data of the token's Secret.

use std::collections::BTreeMap;

use gantry_api::bootstrap_token::{
    AUTHENTICATION_KEY, BootstrapToken, EXPIRATION_KEY, HASH_KEY, SECRET_KEY, USED_BY_KEY, USES_KEY,
};
use jiff::Timestamp;

/// What to do about every refusal.
const NEXT: &str =
    "make another one on the control plane with: gantry token create --print-join-command";
/// Joins that a Secret remembers, newest first.
const USED_BY_MAX: usize = 1_000;

/// The data of a Secret, as text.
pub(super) type Data = BTreeMap<String, String>;

/// Who wants in.
#[derive(Clone, Copy, Debug)]
pub(super) struct Applicant<'a> {
    pub(super) node: &'a str,
    /// Digest of its public key.
    pub(super) key_hash: &'a str,
}

/// The Secret's data after this join.
///
/// A machine that comes again with the same key, because an answer was lost, uses nothing up.
///
/// # Errors
/// In words: why not, and what to do.
pub(super) fn spend(
    data: Option<&Data>,
    token: &BootstrapToken,
    applicant: Applicant<'_>,
    now: Timestamp,
) -> Result<Data, String> {
    let id = token.id();
    let data = data.ok_or_else(|| {
        format!("token {id} is unknown here (of another cluster, or deleted): {NEXT}")
    })?;
    let text = |key: &str| data.get(key).map(|text| text.trim()).unwrap_or_default();
    // Before everything else, so that who has only the id learns nothing more.
    if !is_same(text(HASH_KEY), text(SECRET_KEY), token) {
        return Err(format!("token {id} is wrong: check it, or {NEXT}"));
    }
    if text(AUTHENTICATION_KEY) != "true" {
        return Err(format!(
            "token {id} is not for joining ({AUTHENTICATION_KEY} is not \"true\"): {NEXT}"
        ));
    }
    if let Some(end) = data.get(EXPIRATION_KEY) {
        let end: Timestamp = end.trim().parse().map_err(|_| {
            format!("token {id} has an expiration that is no RFC 3339 time: {NEXT}")
        })?;
        if end <= now {
            return Err(format!("token {id} expired at {end:.0}: {NEXT}"));
        }
    }
    let record = format!("{} {}", applicant.node, applicant.key_hash);
    let used_by = text(USED_BY_KEY);
    if used_by.lines().any(|line| line.starts_with(&record)) {
        return Ok(data.clone());
    }
    let left: u64 = match data.get(USES_KEY) {
        None => 1 - u64::from(!used_by.is_empty()),
        Some(count) => count.trim().parse().unwrap_or(0),
    };
    if left == 0 {
        let by = used_by.lines().next().and_then(|line| {
            let mut words = line.split(' ');
            Some(format!(" by {} at {}", words.next()?, words.nth(1)?))
        });
        let by = by.unwrap_or_default();
        return Err(format!("token {id} is used up (last{by}): {NEXT}"));
    }
    let mut new = data.clone();
    new.insert(USES_KEY.into(), (left - 1).to_string());
    let mut lines = vec![format!("{record} {now:.0}")];
    lines.extend(used_by.lines().take(USED_BY_MAX - 1).map(str::to_owned));
    new.insert(USED_BY_KEY.into(), lines.join("\n"));
    Ok(new)
}

/// Whether nobody asks for this token any more: it ended more than a day ago.
pub(super) fn is_past(data: &Data, now: Timestamp) -> bool {
    let end = data.get(EXPIRATION_KEY).map(|end| end.trim().parse());
    let Some(Ok::<Timestamp, _>(end)) = end else {
        return false;
    };
    now.as_second() - end.as_second() > 24 * 60 * 60
}

/// Compares digests: how long it takes says nothing of the secret.
fn is_same(hash: &str, secret: &str, token: &BootstrapToken) -> bool {
    if !hash.is_empty() {
        return hash == token.hash();
    }
    let stored = BootstrapToken::parse(&format!("{}.{secret}", token.id()));
    stored.is_ok_and(|stored| stored.hash() == token.hash())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TOKEN: &str = "abcdef.0123456789abcdef";

    fn token(text: &str) -> BootstrapToken {
        BootstrapToken::parse(text).unwrap()
    }

    fn data(extra: &[(&str, &str)]) -> Data {
        let base = [
            (HASH_KEY, token(TOKEN).hash()),
            (AUTHENTICATION_KEY, "true".to_owned()),
        ];
        let extra = extra.iter().map(|(key, value)| (*key, (*value).to_owned()));
        let all = base.into_iter().chain(extra);
        all.map(|(key, value)| (key.to_owned(), value)).collect()
    }

    fn now() -> Timestamp {
        "2026-01-01T00:00:00Z".parse().unwrap()
    }

    fn applicant<'a>(node: &'a str, key_hash: &'a str) -> Applicant<'a> {
        Applicant { node, key_hash }
    }

    #[test]
    fn each_refusal_says_why_and_what_to_do() {
        let a = applicant("a", "k");
        let wrong = token("abcdef.0123456789abcdee");
        for (data, token, words) in [
            (None, token(TOKEN), "unknown"),
            (Some(data(&[])), wrong, "is wrong"),
            (
                Some(data(&[(AUTHENTICATION_KEY, "false")])),
                token(TOKEN),
                "not for joining",
            ),
            (
                Some(data(&[(EXPIRATION_KEY, "2025-12-31T23:59:59Z")])),
                token(TOKEN),
                "expired at 2025-12-31T23:59:59Z",
            ),
            (
                Some(data(&[(EXPIRATION_KEY, "tomorrow")])),
                token(TOKEN),
                "RFC 3339",
            ),
            (Some(data(&[(USES_KEY, "0")])), token(TOKEN), "used up"),
            (Some(data(&[(USES_KEY, "-1")])), token(TOKEN), "used up"),
        ] {
            let refusal = spend(data.as_ref(), &token, a, now()).unwrap_err();
            assert!(refusal.contains(words), "{refusal}");
            assert!(refusal.contains("gantry token create"), "{refusal}");
            assert!(!refusal.contains("0123456789"), "{refusal}");
        }
    }

    #[test]
    fn a_wrong_secret_learns_nothing_of_the_token() {
        let spent = data(&[(USES_KEY, "0"), (USED_BY_KEY, "secret-node k t")]);
        let wrong = token("abcdef.aaaaaaaaaaaaaaaa");
        let refusal = spend(Some(&spent), &wrong, applicant("a", "k"), now()).unwrap_err();
        assert!(
            !refusal.contains("secret-node") && !refusal.contains("used"),
            "{refusal}"
        );
    }

    #[test]
    fn one_use_is_one_machine_that_may_ask_again() {
        let first = spend(Some(&data(&[])), &token(TOKEN), applicant("a", "k1"), now()).unwrap();
        assert_eq!(first[USES_KEY], "0");
        let again = spend(Some(&first), &token(TOKEN), applicant("a", "k1"), now()).unwrap();
        assert_eq!(again, first);
        for other in [applicant("a", "k2"), applicant("b", "k1")] {
            let refusal = spend(Some(&first), &token(TOKEN), other, now()).unwrap_err();
            assert!(
                refusal.contains("used up (last by a at 2026-01-01T00:00:00Z)"),
                "{refusal}"
            );
        }
    }

    #[test]
    fn a_secret_of_kubernetes_is_taken_and_has_one_use_too() {
        let mut data = data(&[(SECRET_KEY, "0123456789abcdef")]);
        data.remove(HASH_KEY);
        let new = spend(Some(&data), &token(TOKEN), applicant("a", "k"), now()).unwrap();
        assert_eq!(new[USES_KEY], "0");
        let wrong = token("abcdef.0123456789abcdee");
        assert!(spend(Some(&data), &wrong, applicant("a", "k"), now()).is_err());
        data.remove(SECRET_KEY);
        assert!(spend(Some(&data), &token(TOKEN), applicant("a", "k"), now()).is_err());
    }

    #[test]
    fn a_token_is_forgotten_a_day_after_its_end() {
        let ended = |end: &str| is_past(&data(&[(EXPIRATION_KEY, end)]), now());
        assert!(ended("2025-12-30T23:00:00Z"));
        assert!(!ended("2025-12-31T23:00:00Z"));
        assert!(!ended("never"));
        assert!(!is_past(&data(&[]), now()));
    }

    proptest! {
        /// However machines come, and come again: exactly `uses` different ones get in.
        #[test]
        fn as_many_machines_as_uses(uses in 0_u64..6, order in prop::collection::vec(0_u8..8, 0..40)) {
            let mut held = data(&[(USES_KEY, &uses.to_string())]);
            let mut inside = std::collections::BTreeSet::new();
            for number in order {
                let (node, key) = (format!("n{number}"), format!("k{number}"));
                let applicant = applicant(&node, &key);
                match spend(Some(&held), &token(TOKEN), applicant, now()) {
                    Ok(new) => { held = new; inside.insert(number); }
                    Err(_) => prop_assert_eq!(inside.len() as u64, uses),
                }
                prop_assert!(inside.len() as u64 <= uses);
            }
        }
    }
}
