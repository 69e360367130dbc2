//! Memory of the C allocator: what a burst of pods has used goes back to the kernel afterwards.
//!
//! glibc gives each thread an arena of its own (8 per CPU), and keeps what was freed in them. The
//! agent's blocking calls come and go in dozens of threads: with 253 pods created at once, 74 of 95 MiB
//! of its heap were free memory. So arenas are two, and when the process has grown the free pages in them
//! are given back.

use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};
use tokio_util::sync::CancellationToken;

/// Enough for two CPUs' worth of threads; most allocations are served by a thread's own cache.
const ARENA_COUNT: i32 = 2;
/// How often the process is looked at.
pub const INTERVAL: Duration = Duration::from_secs(10);
/// Less growth than this is not worth looking for free pages.
const GROWTH_BYTES: u64 = 8 << 20;

/// For the beginning of `main`: threads that run already keep their arenas.
pub fn limit_arenas() {
    // SAFETY: integers only; called before other threads exist.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENA_COUNT) };
}

/// Gives free pages back whenever the process has grown, until `shutdown`.
pub async fn give_back(interval: Duration, shutdown: CancellationToken) {
    let mut after = 0;
    loop {
        tokio::select! {
            // Cancel-safe: a timer, and waiting for the end.
            () = tokio::time::sleep(interval) => {}
            () = shutdown.cancelled() => return,
        }
        if resident_bytes() > after + GROWTH_BYTES {
            // Milliseconds, with the arenas locked one after the other.
            let trimmed = tokio::task::spawn_blocking(|| {
                // SAFETY: thread-safe by its contract; it touches free chunks only.
                unsafe { libc::malloc_trim(0) };
            });
            let _ = trimmed.await;
            after = resident_bytes();
        }
    }
}

/// 0 when the kernel does not tell: then nothing is trimmed.
fn resident_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = text.split(' ').nth(1).and_then(|word| word.parse().ok());
    let page_bytes = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(0);
    pages.unwrap_or(0u64) * u64::try_from(page_bytes).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_freed_goes_back() {
        // Small pieces with a kept one at the end: the allocator alone would keep all of it.
        let pieces: Vec<Vec<u8>> = (0..20_000).map(|_| vec![1; 2_000]).collect();
        let _last = vec![1u8; 2_000];
        let full = resident_bytes();
        assert!(full > 40_000_000, "{full}");
        drop(pieces);
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(give_back(Duration::from_millis(50), shutdown.clone()));
        tokio::time::timeout(INTERVAL, async {
            while resident_bytes() > full - 30_000_000 {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
        .await
        .unwrap();
        shutdown.cancel();
        task.await.unwrap();
    }
}
