//! What can go wrong while wiring, and the CNI error code of each.

use std::io;

/// An error of this crate. The text is complete; sources are not repeated in it.
#[derive(Debug, thiserror::Error)]
pub enum CniError {
    /// The kernel refused a netlink request.
    #[error("{what}: {source}")]
    Kernel {
        /// The request, with names.
        what: String,
        /// The kernel's errno.
        source: io::Error,
    },
    /// A file or a system call failed.
    #[error("{context}: {source}")]
    Io {
        /// What was being done, to which path.
        context: String,
        /// The error of the call.
        source: io::Error,
    },
    /// A field of the network configuration has a value that cannot be used.
    #[error("network configuration: {field}: {message}")]
    Config {
        /// Its path.
        field: String,
        /// What is wrong, and what would be right.
        message: String,
    },
    /// A field of the network configuration asks for what this plugin does not do.
    #[error("network configuration: {field}: {message}")]
    Unsupported {
        /// Its path.
        field: String,
        /// What to do instead.
        message: String,
    },
    /// The configuration is no JSON of the expected shape.
    #[error("network configuration: {0}")]
    Decode(String),
    /// `cniVersion` is none of ours.
    #[error("cniVersion {version:?}: want one of {supported}")]
    Version {
        /// What was asked for.
        version: String,
        /// What we speak, comma separated.
        supported: String,
    },
    /// A `CNI_*` environment variable is missing or malformed.
    #[error("{variable}: {message}")]
    Environment {
        /// Its name.
        variable: &'static str,
        /// What is wrong with it.
        message: String,
    },
    /// The range is used up.
    #[error(
        "no free address in {range} of network {network}: all {size} are leased; \
         delete pods or give this node a larger prefix"
    )]
    Exhausted {
        /// The network.
        network: String,
        /// The prefix.
        range: String,
        /// How many addresses can be leased from it.
        size: u64,
    },
    /// Somebody else holds the lease lock.
    #[error("{path}: locked by another process for {waited_ms} ms; try again")]
    Locked {
        /// The lock file.
        path: String,
        /// How long we waited.
        waited_ms: u64,
    },
    /// The container's network is not what ADD made.
    #[error("{0}")]
    Check(String),
    /// The netns or the interface cannot be used for an attachment.
    #[error("{0}")]
    Container(String),
    /// STATUS: ADD would fail now.
    #[error("{0}")]
    NotReady(String),
    /// Several things failed while tearing down; the rest was done.
    #[error("{}", join(.0))]
    Several(Vec<CniError>),
}

fn join(errors: &[CniError]) -> String {
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    texts.join("; ")
}

impl CniError {
    /// The CNI error code: 1-99 are the specification's, from 100 on they are ours.
    pub fn code(&self) -> u32 {
        match self {
            Self::Version { .. } => 1,
            Self::Unsupported { .. } => 2,
            Self::Environment { .. } => 4,
            Self::Io { .. } => 5,
            Self::Decode(_) => 6,
            Self::Config { .. } => 7,
            Self::Locked { .. } => 11,
            Self::NotReady(_) => 50,
            Self::Kernel { .. } => 100,
            Self::Exhausted { .. } => 101,
            Self::Check(_) => 102,
            Self::Container(_) => 103,
            Self::Several(_) => 104,
        }
    }

    /// The errno behind it, where there is one.
    pub fn raw_os_error(&self) -> Option<i32> {
        match self {
            Self::Kernel { source, .. } | Self::Io { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Nothing, the one error, or all of them.
    pub fn all(mut errors: Vec<CniError>) -> Result<(), CniError> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }

    /// Wraps the error of a call on a file.
    pub fn io(context: impl Into<String>) -> impl FnOnce(io::Error) -> CniError {
        let context = context.into();
        move |source| CniError::Io { context, source }
    }
}
