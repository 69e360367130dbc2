//! How many files the control plane may have open: a connection for each agent and each client. Service
//! managers and shells give 1,024, which is the end at some thousand nodes; the hard limit is far above.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the limit to the hard one, and returns it. Nobody inherits it: no program is started.
pub fn raise() -> u64 {
    let kind = Resource::RLIMIT_NOFILE;
    let raised = getrlimit(kind).and_then(|(_, hard)| setrlimit(kind, hard, hard).map(|()| hard));
    raised.unwrap_or_else(|error| {
        tracing::warn!(%error, "the limit of open files stays as it is");
        getrlimit(kind).map_or(0, |(soft, _)| soft)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_soft_limit_becomes_the_hard_one() {
        let kind = Resource::RLIMIT_NOFILE;
        let (_, hard) = getrlimit(kind).unwrap();
        setrlimit(kind, hard.min(256), hard).unwrap();
        assert_eq!(raise(), hard);
        assert_eq!(getrlimit(kind).unwrap().0, hard);
    }
}
