//! Calls to plugins of the node (device plugins, CSI drivers) over their sockets: bounded in time,
//! with errors in words.

use std::path::Path;
use std::time::Duration;

use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// A plugin takes a connection within this.
const DIAL: Duration = Duration::from_secs(5);
/// Characters of a plugin's own words that are passed on.
const WORDS_MAX: usize = 1024;

/// Connects to a socket.
pub(crate) async fn connect(socket: &Path) -> Result<Channel, String> {
    let uri = format!("unix://{}", socket.display());
    let endpoint = Endpoint::from_shared(uri).map_err(|error| error.to_string())?;
    let endpoint = endpoint.connect_timeout(DIAL);
    match tokio::time::timeout(DIAL, endpoint.connect()).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(format!("{}: {}", socket.display(), innermost(&error))),
        Err(_) => Err(format!("{}: takes no connection", socket.display())),
    }
}

/// The answer of a call, within `patience`.
pub(crate) async fn in_time<T>(
    patience: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(patience, call).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(Status::deadline_exceeded(format!(
            "no answer within {} s",
            patience.as_secs_f32()
        ))),
    }
}

/// What a plugin said, for a person.
pub(crate) fn words(status: &Status) -> String {
    let message: String = status.message().chars().take(WORDS_MAX).collect();
    format!("{}: {message}", status.code())
}

/// The cause that a person can act on.
fn innermost(error: &dyn std::error::Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
