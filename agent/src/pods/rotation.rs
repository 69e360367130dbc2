//! Keeps the logs of running containers small: looks every ten seconds, as the kubelet does.
//!
//! A log grows past its limit between two looks by what its container writes in that time. Nothing
//! is lost by a crash: a file that was put aside and not replaced is still written by its shim,
//! and the next look asks the shim again.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::runtime::logs::files::{self, Limits};
use crate::runtime::{OpenLog, Runtime};

/// Between two looks; the kubelet's `containerLogMonitorInterval`.
const INTERVAL: Duration = Duration::from_secs(10);

/// Rotates until `shutdown`.
pub async fn run(runtime: Arc<dyn Runtime>, limits: Limits, shutdown: CancellationToken) {
    loop {
        tokio::select! {
            // Cancel-safe: both only wait.
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep(INTERVAL) => {}
        }
        for log in runtime.open_logs() {
            if let Err(words) = rotate(&*runtime, &log, limits).await {
                warn!(run = %log.run, "the log is not rotated: {words}");
            }
        }
    }
}

/// Rotates one log if it is too large. Public for the tests, which do not wait for the clock.
///
/// # Errors
/// In words: what failed. The log goes on in any case.
pub async fn rotate(runtime: &dyn Runtime, open: &OpenLog, limits: Limits) -> Result<(), String> {
    let log = &open.path;
    let bytes = std::fs::metadata(log).ok().map(|file| file.len());
    if bytes.is_some_and(|bytes| bytes <= limits.bytes_max) {
        return Ok(());
    }
    let before = files::rotated(log).map_err(|error| error.to_string())?;
    // Absent: not made yet, or renamed by a look whose request to the shim failed.
    if bytes.is_none() && before.is_empty() {
        return Ok(());
    }
    let to = files::next_name(log, &before, Timestamp::now());
    let rotated = runtime.rotate_log(&open.run, log, &to).await;
    rotated.map_err(|error| error.to_string())?;
    debug!(run = %open.run, to = %to.display(), "log rotated");
    let all = files::rotated(log).map_err(|error| error.to_string())?;
    for old in files::surplus(&all, limits) {
        std::fs::remove_file(old).map_err(|error| format!("{}: {error}", old.display()))?;
    }
    Ok(())
}
