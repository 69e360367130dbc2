//! Limits that were hit: which cgroup ran out of memory and who was large then, and which pod
//! could not fork.
//!
//! ```text
//! /dev/kmsg ─► kernel_log (pure) ─► OomReport ─┐
//!                                              ├─► words (pure) ─► pod's event, `OOMKilled` or `PidsLimitReached`
//! memory.events, pids.events ──────────────────┘
//! ```
//! The kernel's log is the only place that names the cgroup whose limit was hit *and* the processes
//! with their sizes at that moment. Where it may not be read (no CAP_SYSLOG), or where its line was
//! dropped, the counters still tell that something was killed, and the event says that the rest is
//! unknown. Counters are compared with those of the agent's start: what happened before is old news.
//!
//! An idle node is not to read four files of each pod every five seconds: the machine's own count
//! of kills says whether there is one to be found, and the log tells of a refused fork at once. All
//! counters are read every 30 s besides, and every 5 s where one of the two is missing.

pub mod kernel_log;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{Read, Seek, SeekFrom};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use self::kernel_log::{Assembler, OomReport, Report};
use crate::cgroups::Cgroups;
use crate::cgroups::limits::{pod_limits, qos_class};
use crate::cgroups::stats::LimitHits;
use crate::ids::PodUid;
use crate::pods::Order;
use crate::pressure::victim::bytes_text;
use crate::readiness;
use crate::view::View;

/// How often is looked whether counters are to be compared.
const PERIOD: Duration = Duration::from_secs(5);
/// One look in so many compares them in any case.
const LOOKS: u32 = 6;
/// Reports that wait for their counter.
const REPORTS_MAX: usize = 64;
/// Bytes of one record of the kernel's log.
const RECORD_BYTES_MAX: usize = 8 << 10;

/// The task that watches for hit limits.
pub struct Watcher {
    cgroups: Cgroups,
    view: watch::Receiver<Arc<View>>,
    orders: mpsc::Sender<Order>,
    known: BTreeMap<PodUid, LimitHits>,
    /// Pods of which the kernel's log told since the last look: their counters are no news.
    told: BTreeSet<PodUid>,
    /// As `told`, for refused forks.
    refused: BTreeSet<PodUid>,
    /// Kills of which the log may still tell.
    untold: BTreeMap<PodUid, u64>,
    /// The machine's count of kills at the last look.
    machine_kills: Option<u64>,
    look: u32,
}

impl Watcher {
    /// * `orders` – to the pod workers.
    pub fn new(
        cgroups: Cgroups,
        view: watch::Receiver<Arc<View>>,
        orders: mpsc::Sender<Order>,
    ) -> Self {
        Self {
            cgroups,
            view,
            orders,
            known: BTreeMap::new(),
            told: BTreeSet::new(),
            refused: BTreeSet::new(),
            untold: BTreeMap::new(),
            machine_kills: None,
            look: 0,
        }
    }

    /// Watches until `shutdown`.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let log = KernelLog::open();
        if let Err(error) = &log {
            info!(%error, "/dev/kmsg cannot be read: OOM events will not name processes");
        }
        let mut log = log.ok();
        self.compare(true, false).await;
        let mut tick = tokio::time::interval(PERIOD);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            let reports = async {
                match &mut log {
                    Some(log) => log.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                // Each arm is cancel-safe: records stay in the kernel until they are read, and an
                // unfinished report stays in the assembler.
                () = shutdown.cancelled() => return,
                reports = reports => match reports {
                    Some(reports) => for report in reports {
                        match report {
                            Report::Oom(report) => self.told_by_the_kernel(report).await,
                            Report::ForkRefused(cgroup) => self.fork_refused(&cgroup).await,
                        }
                    },
                    None => log = None,
                },
                _ = tick.tick() => if self.is_due(log.is_some()) {
                    self.compare(false, log.is_some()).await;
                },
            }
        }
    }

    /// Whether there may be news in the counters.
    fn is_due(&mut self, log_is_read: bool) -> bool {
        let text = std::fs::read_to_string("/proc/vmstat").unwrap_or_default();
        let kills = crate::cgroups::stats::field(&text, "oom_kill");
        let before = std::mem::replace(&mut self.machine_kills, kills);
        self.look = (self.look + 1) % LOOKS;
        self.look == 0
            || !log_is_read
            || kills.is_none()
            || kills != before
            || !self.untold.is_empty()
            || !self.told.is_empty()
    }

    async fn told_by_the_kernel(&mut self, report: OomReport) {
        let Some((uid, container)) = pod_of(&report.victim_cgroup) else {
            return; // nobody of ours
        };
        self.told.insert(uid.clone());
        let message = words(&report, &container);
        self.tell(uid, "OOMKilled", message).await;
    }

    /// At once, since what cannot fork often ends and takes its counters along.
    async fn fork_refused(&mut self, cgroup: &str) {
        let Some((uid, _)) = pod_of(cgroup) else {
            return;
        };
        let view = self.view.borrow().clone();
        let Some(pod) = view.pods.get(&uid) else {
            return;
        };
        let limit = pod_limits(pod, self.cgroups.policy()).pids_max;
        self.refused.insert(uid.clone());
        self.tell(uid, "PidsLimitReached", pids_words(limit, None))
            .await;
    }

    async fn tell(&self, pod: PodUid, reason: &'static str, message: String) {
        let order = Order::Event {
            pod,
            reason,
            message,
        };
        let _ = self.orders.send(order).await;
    }

    /// Compares all pods' counters with those of the last look. A kill of which the log has not told
    /// waits one look: counter and log are not read at the same moment.
    async fn compare(&mut self, first: bool, log_is_read: bool) {
        let view = self.view.borrow().clone();
        let (cgroups, pods) = (self.cgroups.clone(), view.pods.clone());
        let read = tokio::task::spawn_blocking(move || {
            let hits = |(uid, pod): (&PodUid, &Arc<_>)| {
                let path = cgroups.pod_path(uid, qos_class(pod));
                Some((uid.clone(), cgroups.limit_hits(&path).ok()?))
            };
            pods.iter().filter_map(hits).collect::<BTreeMap<_, _>>()
        });
        let now = read.await.unwrap_or_default();
        for (uid, hits) in &now {
            let before = match self.known.get(uid) {
                Some(before) => *before,
                None if first => *hits,
                None => LimitHits::default(),
            };
            if hits.pids > before.pids
                && !self.refused.remove(uid)
                && let Some(pod) = view.pods.get(uid)
            {
                let limit = pod_limits(pod, self.cgroups.policy()).pids_max;
                let message = pids_words(limit, Some(hits.pids - before.pids));
                self.tell(uid.clone(), "PidsLimitReached", message).await;
            }
            let new = hits.oom_kills.saturating_sub(before.oom_kills);
            let waited = self.untold.remove(uid);
            if self.told.remove(uid) {
                continue;
            }
            let news = match (new, log_is_read) {
                (0, _) => waited,
                (new, true) => {
                    self.untold.insert(uid.clone(), new);
                    waited
                }
                (new, false) => Some(new),
            };
            if let Some(count) = news {
                let message = format!(
                    "The kernel's OOM killer took {count} of its processes; which limit was hit and \
                     who was large is unknown, since the kernel's log does not tell"
                );
                self.tell(uid.clone(), "OOMKilled", message).await;
            }
        }
        self.untold.retain(|uid, _| now.contains_key(uid));
        self.told.clear();
        self.refused.retain(|uid| now.contains_key(uid));
        self.known = now;
    }
}

/// `/gantry/<class>/pod<uid>/<container>/...`: the pod and the container.
fn pod_of(cgroup: &str) -> Option<(PodUid, String)> {
    let mut parts = cgroup.strip_prefix("/gantry/")?.split('/').skip(1);
    let uid = PodUid::new(parts.next()?.strip_prefix("pod")?).ok()?;
    Some((uid, parts.next().unwrap_or_default().to_owned()))
}

/// Which limit was hit, in words: of the container, the pod, all pods, or the machine.
fn level(limit_cgroup: Option<&str>) -> String {
    let Some(path) = limit_cgroup else {
        return "the machine has no memory left".to_owned();
    };
    let depth = path.split('/').filter(|part| !part.is_empty()).count();
    let name = path.rsplit('/').next().unwrap_or_default();
    match (path.starts_with("/gantry"), depth) {
        (true, 1) => "all pods together have reached the node's allocatable memory".to_owned(),
        (true, 2) => format!("the pods of class {name} have reached their limit"),
        (true, 3) => "the pod has reached its memory limit".to_owned(),
        (true, 4) => format!("container {name} has reached its memory limit"),
        _ => format!("cgroup {path} has reached its memory limit"),
    }
}

/// The event's words.
fn words(report: &OomReport, container: &str) -> String {
    let mut text = format!(
        "Container {container}: {}: the kernel killed {} (process {}, {} anonymous memory)",
        level(report.limit_cgroup.as_deref()),
        report.victim_name,
        report.victim_pid,
        bytes_text(report.victim_anon_bytes),
    );
    if let Some((limit, usage)) = report.limit_and_usage {
        text.push_str(&format!(
            "; limit {}, usage {}",
            bytes_text(limit),
            bytes_text(usage)
        ));
    }
    if !report.largest.is_empty() {
        let list: Vec<String> = report
            .largest
            .iter()
            .map(|p| format!("{} {} (process {})", p.name, bytes_text(p.rss_bytes), p.pid))
            .collect();
        text.push_str(&format!("; largest there: {}", list.join(", ")));
    }
    text.push_str(". Raise the limit, or make the program use less");
    text
}

fn pids_words(limit: Option<u64>, refused: Option<u64>) -> String {
    let refused = match refused {
        Some(count) => format!("{count} more could not be started"),
        None => "no more can be started".to_owned(),
    };
    let limit = limit.map_or_else(
        || "a limit of a cgroup above it".to_owned(),
        |limit| format!("its limit of {limit} processes and threads (pids.max of the pod)"),
    );
    format!(
        "The pod has reached {limit}: {refused}. Look for processes that \
         are never waited for, or raise --pod-max-pids of gantry-agent"
    )
}

/// The kernel's log from now on.
struct KernelLog {
    file: AsyncFd<std::fs::File>,
    assembler: Assembler,
}

impl KernelLog {
    fn open() -> std::io::Result<Self> {
        let mut file = std::fs::File::options()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")?;
        file.seek(SeekFrom::End(0))?;
        Ok(Self {
            file: readiness::watch(file, Interest::READABLE)?,
            assembler: Assembler::default(),
        })
    }

    /// Reports that are complete now; none: the log cannot be read any more.
    async fn next(&mut self) -> Option<VecDeque<Report>> {
        let mut guard = self.file.readable_mut().await.ok()?;
        let mut found = VecDeque::new();
        let mut buffer = vec![0u8; RECORD_BYTES_MAX];
        loop {
            // One record per read.
            match guard.get_inner_mut().read(&mut buffer) {
                Ok(0) => return None,
                Ok(length) => {
                    let record = String::from_utf8_lossy(&buffer[..length]);
                    found.extend(self.assembler.push(&record));
                    if found.len() > REPORTS_MAX {
                        found.pop_front();
                    }
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
                // EPIPE: records were overwritten before we read them; go on with the next.
                Err(error) if error.raw_os_error() == Some(libc::EPIPE) => {
                    debug!("the kernel's log was faster than its reader");
                }
                // EINVAL: a record longer than the buffer is skipped by the kernel.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {}
                Err(error) => {
                    debug!(%error, fd = ?guard.get_inner().as_fd(), "read /dev/kmsg");
                    return None;
                }
            }
        }
        guard.clear_ready();
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::kernel_log::Process;
    use super::*;

    #[test]
    fn the_level_says_whose_limit_was_hit() {
        assert!(level(None).contains("machine"));
        assert!(level(Some("/gantry")).contains("allocatable"));
        assert!(level(Some("/gantry/burstable/podx")).contains("pod has reached"));
        assert!(level(Some("/gantry/burstable/podx/web")).contains("container web"));
        assert!(level(Some("/system.slice")).contains("/system.slice"));
    }

    #[test]
    fn pods_are_known_by_their_cgroup() {
        let (uid, container) = pod_of("/gantry/besteffort/podab-1/main/deep").unwrap();
        assert_eq!((uid.as_str(), container.as_str()), ("ab-1", "main"));
        for foreign in ["/", "/gantry", "/user/podx", "/gantry/burstable/x/main"] {
            assert_eq!(pod_of(foreign), None, "{foreign}");
        }
    }

    #[test]
    fn an_event_has_limit_victim_and_the_largest() {
        let report = OomReport {
            victim_cgroup: "/gantry/burstable/podu/main".into(),
            limit_cgroup: Some("/gantry/burstable/podu/main".into()),
            victim_pid: 7,
            victim_name: "java".into(),
            victim_anon_bytes: 500 << 20,
            limit_and_usage: Some((512 << 20, 512 << 20)),
            largest: vec![Process {
                pid: 7,
                name: "java".into(),
                rss_bytes: 501 << 20,
            }],
        };
        let text = words(&report, "main");
        for part in [
            "container main has reached its memory limit",
            "killed java (process 7, 500Mi",
            "limit 512Mi",
            "largest there: java 501Mi",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(pids_words(Some(64), Some(3)).contains("limit of 64 processes"));
    }
}
