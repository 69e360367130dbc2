//! Bootstrap tokens, as Kubernetes has them: `abcdef.0123456789abcdef`, kept as a Secret of type
//! `bootstrap.kubernetes.io/token` in `kube-system`.
//!
//! The part before the dot names the token and is no secret; the other part is. A Secret made here holds
//! only the digest of the whole token ([`HASH_KEY`]); one made for Kubernetes holds [`SECRET_KEY`] itself.
//! Both are taken.
//!
//! Source: Kubernetes `cluster-bootstrap/token`.

use std::fmt;

use sha2::{Digest, Sha256};

/// The namespace of the Secrets.
pub const NAMESPACE: &str = "kube-system";
/// Their type.
pub const SECRET_TYPE: &str = "bootstrap.kubernetes.io/token";
/// What precedes the id in their names.
pub const NAME_PREFIX: &str = "bootstrap-token-";
/// The part before the dot.
pub const ID_KEY: &str = "token-id";
/// The part after it, in Secrets that were made for Kubernetes.
pub const SECRET_KEY: &str = "token-secret";
/// SHA-256 of the whole token, in hexadecimal.
pub const HASH_KEY: &str = "token-hash";
/// When it ends, RFC 3339; absent: never.
pub const EXPIRATION_KEY: &str = "expiration";
/// "true", or the token joins nobody.
pub const AUTHENTICATION_KEY: &str = "usage-bootstrap-authentication";
/// For people.
pub const DESCRIPTION_KEY: &str = "description";
/// Joins that are left; absent: one.
pub const USES_KEY: &str = "gantry-uses";
/// A line for each join: node, digest of its key, time.
pub const USED_BY_KEY: &str = "gantry-used-by";

const ID_LEN: usize = 6;
const SECRET_LEN: usize = 16;
const LETTERS: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";

/// A well-formed token. Neither `Debug` nor `Display` shows its secret part.
#[derive(Clone, PartialEq, Eq)]
pub struct BootstrapToken {
    text: String,
}

/// The words for a text that is no token.
pub const MALFORMED: &str = "the token is malformed: want six and sixteen lower case letters and digits, \
                             as in abcdef.0123456789abcdef";

impl BootstrapToken {
    /// Reads a token.
    ///
    /// # Errors
    /// [`MALFORMED`], which does not repeat the text.
    pub fn parse(text: &str) -> Result<Self, &'static str> {
        let is_fine = |part: &str, len: usize| {
            part.len() == len && part.bytes().all(|byte| LETTERS.contains(&byte))
        };
        match text.split_once('.') {
            Some((id, secret)) if is_fine(id, ID_LEN) && is_fine(secret, SECRET_LEN) => Ok(Self {
                text: text.to_owned(),
            }),
            _ => Err(MALFORMED),
        }
    }

    /// A token of random bytes; a byte that would favour some letters is left out. `None`: too few.
    pub fn from_random(bytes: &[u8]) -> Option<Self> {
        let limit = u8::try_from(256 / LETTERS.len() * LETTERS.len()).ok()?;
        let mut letters = bytes
            .iter()
            .filter(|byte| **byte < limit)
            .map(|byte| char::from(LETTERS[usize::from(*byte) % LETTERS.len()]));
        let mut text: String = letters.by_ref().take(ID_LEN).collect();
        text.push('.');
        text.extend(letters.take(SECRET_LEN));
        Self::parse(&text).ok()
    }

    /// The public part.
    pub fn id(&self) -> &str {
        &self.text[..ID_LEN]
    }

    /// The name of its Secret.
    pub fn secret_name(&self) -> String {
        format!("{NAME_PREFIX}{}", self.id())
    }

    /// The whole token: only for whoever is to join with it.
    pub fn expose(&self) -> &str {
        &self.text
    }

    /// What the Secret holds of it.
    pub fn hash(&self) -> String {
        hex(&sha256(self.text.as_bytes()))
    }
}

impl fmt::Debug for BootstrapToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BootstrapToken({})", self.id())
    }
}

/// The digest that tokens and keys are known by.
pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Bytes in hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}"); // a String takes everything
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn only_kubernetes_form_is_a_token_and_its_secret_is_not_shown() {
        let token = BootstrapToken::parse("abcdef.0123456789abcdef").unwrap();
        assert_eq!(token.secret_name(), "bootstrap-token-abcdef");
        assert_eq!(format!("{token:?}"), "BootstrapToken(abcdef)");
        for text in [
            "",
            ".",
            "abcdef",
            "abcdef.",
            "abcdef.0123456789abcde",
            "abcdef.0123456789abcdefg",
            "Abcdef.0123456789abcdef",
            "abcdef.0123456789abcdef\n",
            "abc.def0123456789abcdef",
            "äbcde.0123456789abcdef",
        ] {
            assert_eq!(BootstrapToken::parse(text), Err(MALFORMED), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn random_bytes_make_tokens_that_are_read_back(bytes in prop::collection::vec(any::<u8>(), 64)) {
            let token = BootstrapToken::from_random(&bytes).unwrap();
            prop_assert_eq!(&BootstrapToken::parse(token.expose()).unwrap(), &token);
            prop_assert_eq!(token.hash().len(), 64);
            let shown = format!("{token:?}");
            prop_assert!(!shown.contains(&token.expose()[7..]));
        }

        #[test]
        fn nothing_panics(text in "\\PC{0,30}") {
            let _ = BootstrapToken::parse(&text);
        }
    }
}
