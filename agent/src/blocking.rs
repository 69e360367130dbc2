//! Work that blocks on the disk, beside the async runtime.
//!
//! In production it goes to a thread that may block. The simulation has one thread, whose order is the
//! seed's: there it is done at once, in the caller's turn.

use std::sync::atomic::{AtomicBool, Ordering};

use tokio::task::JoinError;

static IN_TURN: AtomicBool = AtomicBool::new(false);

/// From now on blocking work is done in the caller's turn: for the simulation.
pub fn in_turn() {
    IN_TURN.store(true, Ordering::Relaxed);
}

/// Does `work` where it may block.
pub async fn run<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, JoinError> {
    if IN_TURN.load(Ordering::Relaxed) {
        tokio::task::yield_now().await;
        let done = work();
        tokio::task::yield_now().await;
        return Ok(done);
    }
    tokio::task::spawn_blocking(work).await
}
