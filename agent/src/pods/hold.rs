//! Which pods, and Services, may begin on an agent that has just started.
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
//!
//! Services are held in the same way, but only after a reboot ([`services`]): what the disk has of them may
//! be older than what this node has acked, and the pods that it names may have been ended upon that word.
//! Where the agent alone begins anew, the kernel still has what was acked, and nothing is held.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use gantry_api::rules::{self, Rule};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::feed::Link;
use crate::view::View;

/// How long the control plane is waited for.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// How long a machine that was off programs no Services without the control plane's word: the 40 s after
/// which no drain waits for this node any more, and the time that it takes to decide so.
pub const SERVICES_PATIENCE: Duration = Duration::from_secs(45);

/// Below `/run/gantry`, which goes with the memory: in this boot Services are held no more.
pub(crate) const BEGUN: &str = "services-begun";

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
                        "no control plane was met: what the disk has is begun"
                    );
                    return;
                }
            }
        }
    }
}

/// The view for those who program Services: without any, and at no revision, while they are held.
///
/// `link` must tell of a commit after `view` has it, as the feed's does.
pub fn services(
    run: &Path,
    view: watch::Receiver<Arc<View>>,
    link: watch::Receiver<Link>,
    shutdown: CancellationToken,
) -> watch::Receiver<Arc<View>> {
    let patience = match rules::is_off(Rule::GraceAfterReboot) {
        false => SERVICES_PATIENCE,
        true => Duration::ZERO,
    };
    services_after(run, view, Hold::new(link, patience), shutdown)
}

fn services_after(
    run: &Path,
    mut view: watch::Receiver<Arc<View>>,
    mut hold: Hold,
    shutdown: CancellationToken,
) -> watch::Receiver<Arc<View>> {
    let begun = run.join(BEGUN);
    if begun.exists() {
        return view;
    }
    let (sender, shown) = watch::channel(without_services(&view.borrow_and_update()));
    tokio::spawn(async move {
        let mut is_held = true;
        loop {
            tokio::select! {
                // Cancel-safe: each only waits.
                () = shutdown.cancelled() => return,
                changed = view.changed() => if changed.is_err() { return },
                () = hold.over(), if is_held => {
                    is_held = false;
                    if let Err(error) = std::fs::write(&begun, "") {
                        let path = begun.display();
                        tracing::warn!(%path, %error, "the next start of the agent holds Services again");
                    }
                }
            }
            let newest = view.borrow_and_update().clone();
            sender.send_replace(match is_held {
                true => without_services(&newest),
                false => newest,
            });
        }
    });
    shown
}

/// What is the node's own stays: the resolver's address, host ports of static pods.
fn without_services(view: &View) -> Arc<View> {
    Arc::new(View {
        rev: 0,
        services: Arc::default(),
        backends: Arc::default(),
        ..view.clone()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::view::ServiceName;

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

    fn with_a_service(rev: u64) -> Arc<View> {
        let name = ServiceName {
            namespace: "default".into(),
            name: "web".into(),
        };
        let mut view = View {
            rev,
            ..View::default()
        };
        Arc::make_mut(&mut view.services).insert(name, Arc::default());
        Arc::new(view)
    }

    /// What is shown, once it is of this revision.
    async fn shown_at(shown: &mut watch::Receiver<Arc<View>>, rev: u64) -> usize {
        let seen = tokio::time::timeout(LONG, shown.wait_for(|view| view.rev == rev));
        let seen = seen.await.expect("it is never shown");
        seen.expect("the hold has ended").services.len()
    }

    #[tokio::test]
    async fn after_a_reboot_services_wait_for_a_commit_and_an_agents_restart_holds_none() {
        let run = tempfile::tempdir().unwrap();
        let (views, view) = watch::channel(with_a_service(7));
        let (link, links) = watch::channel(Link::Offline);
        let stop = CancellationToken::new();
        let hold = || Hold::new(links.clone(), LONG);
        let mut shown = services_after(run.path(), view.clone(), hold(), stop.clone());
        assert_eq!(shown_at(&mut shown, 0).await, 0);
        link.send_replace(Link::Syncing);
        views.send_replace(with_a_service(8));
        tokio::time::sleep(SHORT).await;
        assert_eq!((shown.borrow().rev, shown.borrow().services.len()), (0, 0));
        // Until the end of the wait every start of the agent holds them.
        let again = services_after(run.path(), view.clone(), hold(), stop.clone());
        assert_eq!(again.borrow().rev, 0);

        views.send_replace(with_a_service(9));
        link.send_replace(Link::Live { session: 1 });
        assert_eq!(shown_at(&mut shown, 9).await, 1);
        views.send_replace(with_a_service(10));
        assert_eq!(shown_at(&mut shown, 10).await, 1);

        link.send_replace(Link::Offline);
        let next = services_after(run.path(), view.clone(), hold(), stop.clone());
        assert_eq!(
            next.borrow().rev,
            10,
            "the kernel has them: nothing is held"
        );
    }

    #[tokio::test]
    async fn without_a_control_plane_services_are_the_disks_after_a_while() {
        let run = tempfile::tempdir().unwrap();
        let (_views, view) = watch::channel(with_a_service(7));
        let (_link, links) = watch::channel(Link::Offline);
        let began = Instant::now();
        let hold = Hold::new(links, SHORT);
        let mut shown = services_after(run.path(), view, hold, CancellationToken::new());
        assert_eq!(shown_at(&mut shown, 7).await, 1);
        assert!(began.elapsed() >= SHORT);
    }
}
