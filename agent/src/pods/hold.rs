//! Which pods may begin on an agent that has just started.
//!
//! ```text
//!  start ─► pods whose sandbox is there: at once       (they run, whatever was decided meanwhile)
//!        └► others of the disk: held ─► first commit on a stream of this start ─► those that are in it
//!                                   └─► 30 s in which no control plane was met ─► all of them
//! ```
//! The disk knows what was so before. While this machine was off, its pods may have been given away and
//! their successors may run elsewhere: a node that returns asks first. Who meets a control plane that
//! refuses the node (it was deleted, another machine has its name) begins nothing.
//!
//! Static pods are the node's own and held by nobody. Source: rule 10 of the feed.

use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;

use crate::feed::Link;

/// How long the control plane is waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for the word that pods may begin.
pub struct Hold {
    link: watch::Receiver<Link>,
    patience: Duration,
    until: Instant,
    was_refused: bool,
}

impl Hold {
    /// Begins to wait.
    pub fn new(link: watch::Receiver<Link>, patience: Duration) -> Self {
        Self {
            link,
            patience,
            until: Instant::now() + patience,
            was_refused: false,
        }
    }

    /// Returns when pods may begin. Cancel safe: what was waited so far counts.
    pub async fn over(&mut self) {
        loop {
            let refused = match &*self.link.borrow_and_update() {
                Link::Live { .. } => return,
                Link::Refused(_) => true,
                Link::Offline | Link::Syncing => false,
            };
            if refused {
                self.was_refused = true;
            } else if std::mem::take(&mut self.was_refused) {
                // It was met until just now: without it the wait begins anew.
                self.until = Instant::now() + self.patience;
            }
            let late = tokio::time::sleep_until(self.until);
            tokio::select! {
                changed = self.link.changed() => if changed.is_err() {
                    // The feed has ended with the agent: nothing is to begin.
                    return std::future::pending().await;
                },
                () = late, if !refused => {
                    tracing::warn!(
                        waited_s = self.patience.as_secs(),
                        "no control plane was met: pods begin as the disk has them"
                    );
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(300);
    /// Far longer than [`SHORT`], and than a busy machine is late.
    const LONG: Duration = Duration::from_secs(60);

    async fn is_over_within(hold: &mut Hold, time: Duration) -> bool {
        tokio::time::timeout(time, hold.over()).await.is_ok()
    }

    #[tokio::test]
    async fn a_commit_or_30_s_alone_let_pods_begin() {
        let (link, watch) = watch::channel(Link::Offline);
        let began = Instant::now();
        assert!(is_over_within(&mut Hold::new(watch.clone(), SHORT), LONG).await);
        assert!(began.elapsed() >= SHORT);

        let mut hold = Hold::new(watch.clone(), SHORT);
        assert!(!is_over_within(&mut hold, SHORT / 10).await);
        link.send_replace(Link::Syncing);
        assert!(
            is_over_within(&mut hold, LONG).await,
            "it was cut off in between"
        );

        let mut hold = Hold::new(watch, LONG);
        assert!(
            !is_over_within(&mut hold, SHORT).await,
            "a stream is no commit"
        );
        link.send_replace(Link::Live { session: 1 });
        assert!(is_over_within(&mut hold, LONG / 2).await);
    }

    #[tokio::test]
    async fn a_node_that_is_refused_begins_nothing() {
        let (link, watch) = watch::channel(Link::Refused("deleted".into()));
        let mut hold = Hold::new(watch, SHORT);
        assert!(!is_over_within(&mut hold, SHORT * 4).await);
        link.send_replace(Link::Offline);
        let began = Instant::now();
        assert!(
            is_over_within(&mut hold, LONG).await,
            "from when nobody is met"
        );
        assert!(began.elapsed() >= SHORT);
    }
}
