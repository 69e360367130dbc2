//! Three real etcd servers on loopback.

use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::super::client::Client;
use super::super::proto::StatusRequest;
use super::super::{Replica, Servers, Tls};
use crate::store::{Candidate, Store};
use tokio_util::sync::CancellationToken;

/// `None`: this machine has no etcd.
fn program() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = std::env::split_paths(&path).chain(["/usr/bin".into(), "/usr/sbin".into()]);
    let found = places.find_map(|place| Some(place.join("etcd")).filter(|file| file.is_file()));
    if found.is_none() {
        eprintln!("skipped: etcd is not installed (Debian: etcd-server)");
    }
    found
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// The servers; dropping it ends them.
pub(crate) struct Members {
    program: PathBuf,
    dir: tempfile::TempDir,
    ports: Vec<(u16, u16)>,
    running: Vec<Option<Child>>,
    tls: Option<Tls>,
    /// Further flags of each.
    flags: Vec<String>,
}

/// One control plane's store.
pub(crate) struct Opened {
    pub(crate) store: Store,
    pub(crate) candidate: Candidate,
    pub(crate) lost: CancellationToken,
    pub(crate) stop: CancellationToken,
}

impl Members {
    pub(crate) fn start() -> Option<Members> {
        Members::start_with(None, Vec::new())
    }

    /// With TLS for clients.
    pub(crate) fn start_with(tls: Option<Tls>, flags: Vec<String>) -> Option<Members> {
        let program = program()?;
        let mut members = Members {
            program,
            dir: tempfile::tempdir().unwrap(),
            ports: (0..3).map(|_| (free_port(), free_port())).collect(),
            running: vec![None, None, None],
            tls,
            flags,
        };
        for index in 0..3 {
            members.run(index);
        }
        Some(members)
    }

    pub(crate) fn keys(&self) -> PathBuf {
        self.dir.path().join("store.key")
    }

    /// `127.0.0.1:PORT` of each.
    pub(crate) fn places(&self) -> Vec<String> {
        let place = |(port, _): &(u16, u16)| format!("127.0.0.1:{port}");
        self.ports.iter().map(place).collect()
    }

    fn url(&self, index: usize) -> String {
        let scheme = match self.tls {
            Some(_) => "https",
            None => "http",
        };
        format!("{scheme}://127.0.0.1:{}", self.ports[index].0)
    }

    pub(crate) fn servers(&self) -> Servers {
        Servers {
            urls: (0..3).map(|index| self.url(index)).collect(),
            tls: self.tls.clone(),
        }
    }

    pub(crate) fn run(&mut self, index: usize) {
        let peer = |index: usize| format!("http://127.0.0.1:{}", self.ports[index].1);
        let all: Vec<String> = (0..3).map(|i| format!("m{i}={}", peer(i))).collect();
        let child = Command::new(&self.program)
            .args(["--name", &format!("m{index}")])
            .arg("--data-dir")
            .arg(self.dir.path().join(format!("m{index}")))
            .args(["--listen-client-urls", &self.url(index)])
            .args(["--advertise-client-urls", &self.url(index)])
            .args(["--listen-peer-urls", &peer(index)])
            .args(["--initial-advertise-peer-urls", &peer(index)])
            .args(["--initial-cluster", &all.join(",")])
            .args(["--initial-cluster-state", "new", "--logger", "zap"])
            .args(&self.flags)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        self.running[index] = Some(child);
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self, index: usize) {
        let mut child = self.running[index].take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    fn signal(&self, index: usize, signal: Signal) {
        let id = self.running[index].as_ref().unwrap().id();
        kill(Pid::from_raw(i32::try_from(id).unwrap()), signal).unwrap();
    }

    /// It says nothing any more, and its connections stay.
    pub(crate) fn pause(&self, index: usize) {
        self.signal(index, Signal::SIGSTOP);
    }

    pub(crate) fn resume(&self, index: usize) {
        self.signal(index, Signal::SIGCONT);
    }

    /// The one that orders the others.
    pub(crate) async fn leader(&self) -> usize {
        for index in 0..3 {
            let servers = Servers {
                urls: vec![self.url(index)],
                tls: self.tls.clone(),
            };
            let status = Client::new(servers)
                .ask(Duration::from_secs(20), |open| async move {
                    open.maintenance().status(StatusRequest {}).await
                })
                .await
                .unwrap();
            if status.header.unwrap().member_id == status.leader {
                return index;
            }
        }
        panic!("etcd has no leader")
    }

    /// A control plane's store, which follows.
    pub(crate) async fn open(&self) -> Opened {
        let (lost, stop) = (CancellationToken::new(), CancellationToken::new());
        let keys = self.keys();
        let opening = Store::open_etcd(self.servers(), &keys, "tests", lost.clone(), &stop);
        let (store, candidate) = opening.await.unwrap();
        Opened {
            store,
            candidate,
            lost,
            stop,
        }
    }

    /// One that leads.
    pub(crate) async fn lead(&self, name: &str) -> Opened {
        let opened = self.open().await;
        opened.stand(name).await;
        opened
    }
}

impl Opened {
    pub(crate) async fn stand(&self, name: &str) {
        let us = Replica {
            name: name.to_owned(),
            url: String::new(),
        };
        self.candidate.stand(&us).await.unwrap();
    }
}

impl Drop for Members {
    fn drop(&mut self) {
        for child in self.running.iter_mut().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
