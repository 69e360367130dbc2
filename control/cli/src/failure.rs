//! What goes wrong, in kubectl's words, and the exit code that belongs to it.

use gantry_api::status::{Reason, Status};
use std::fmt;
use std::io::ErrorKind;
use std::process::ExitCode;

/// Why a verb did not do what was asked.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The server refused; `context` is put before its message (`error when creating "x.yaml"`).
    Server {
        status: Box<Status>,
        context: String,
    },
    /// Something on this side.
    Local(String),
    /// No connection to the server; the text is complete.
    Connection(String),
    /// Several things, each reported already: only the exit code is left.
    Reported,
    /// Nobody reads our output any more.
    ClosedPipe,
}

impl Failure {
    pub(crate) fn local(text: impl Into<String>) -> Self {
        Self::Local(text.into())
    }

    /// Adds what was being done to a refusal of the server.
    pub(crate) fn when(self, context: &str) -> Self {
        match self {
            Self::Server { status, .. } => Self::Server {
                status,
                context: context.to_owned(),
            },
            other => other,
        }
    }

    /// The server's refusal, if it is one.
    pub(crate) fn reason(&self) -> Option<Reason> {
        match self {
            Self::Server { status, .. } => Some(status.reason),
            _ => None,
        }
    }

    /// Prints it to stderr and gives the exit code.
    pub(crate) fn report(&self) -> ExitCode {
        match self {
            Self::Reported => ExitCode::FAILURE,
            Self::ClosedPipe => ExitCode::SUCCESS,
            other => {
                eprintln!("{other}");
                ExitCode::FAILURE
            }
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Server { status, context } => write_status(f, status, context),
            Self::Local(text) => write!(f, "error: {text}"),
            Self::Connection(text) => f.write_str(text),
            Self::Reported | Self::ClosedPipe => Ok(()),
        }
    }
}

fn write_status(f: &mut fmt::Formatter<'_>, status: &Status, context: &str) -> fmt::Result {
    // kubectl shows what is invalid as a list of fields.
    if status.reason == Reason::Invalid && !status.details.causes.is_empty() {
        write!(
            f,
            "The {} {:?} is invalid: ",
            status.details.kind, status.details.name
        )?;
        let causes = &status.details.causes;
        if let [cause] = causes.as_slice() {
            return write!(f, "{}: {}", cause.field, cause.message);
        }
        for cause in causes {
            write!(f, "\n* {}: {}", cause.field, cause.message)?;
        }
        return Ok(());
    }
    let separator = if context.is_empty() { "" } else { ": " };
    let message = &status.message;
    if status.reason == Reason::Unknown {
        return write!(f, "Error from server: {context}{separator}{message}");
    }
    let reason = status.reason.as_str();
    write!(
        f,
        "Error from server ({reason}): {context}{separator}{message}"
    )
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        Self::Server {
            status: Box::new(status),
            context: String::new(),
        }
    }
}

impl From<tonic::Status> for Failure {
    fn from(status: tonic::Status) -> Self {
        // Without details it was made on the way: a connection that broke, a server that stopped.
        if status.details().is_empty()
            && matches!(
                status.code(),
                tonic::Code::Unavailable | tonic::Code::Unknown
            )
        {
            let text = format!("Unable to connect to the server: {}", chain(&status));
            return Self::Connection(text);
        }
        Status::from(status).into()
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == ErrorKind::BrokenPipe {
            Self::ClosedPipe
        } else {
            Self::local(error.to_string())
        }
    }
}

/// The causes of an error, outermost first, each text once.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let next = error.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use gantry_api::field::{FieldError, Path};
    use gantry_api::kinds::resolve;

    #[test]
    fn refusals_read_like_kubectls() {
        let pods = resolve("po").unwrap();
        let failure = Failure::from(Status::not_found(pods, "x"));
        assert_eq!(
            failure.to_string(),
            "Error from server (NotFound): pods \"x\" not found"
        );
        let failure =
            Failure::from(Status::bad_request("no")).when("error when creating \"a.yaml\"");
        assert_eq!(
            failure.to_string(),
            "Error from server (BadRequest): error when creating \"a.yaml\": no"
        );
        let error = |field| FieldError::required(&Path::new(field), "");
        let failure = Failure::from(Status::invalid(pods, "x", &[error("a")]));
        assert_eq!(
            failure.to_string(),
            "The Pod \"x\" is invalid: a: Required value"
        );
        let failure = Failure::from(Status::invalid(pods, "x", &[error("a"), error("b")]));
        assert_eq!(
            failure.to_string(),
            "The Pod \"x\" is invalid: \n* a: Required value\n* b: Required value"
        );
    }
}
