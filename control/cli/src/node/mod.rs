//! `gantry init`, `gantry join`, `gantry reset`: this machine becomes part of a cluster, and itself again.
//!
//! ```text
//!  init    units of gantry-control and gantry-agent ─► started ─► a token ─► the line for the next machine
//!  join    gantry-agent join (token, CA hash ─► certificate) ─► unit of gantry-agent ─► started
//!  reset   units, processes ─► gantry-agent cleanup ─► files
//! ```
//! Where no systemd runs (a container, another init system) everything but the start is done, and the
//! commands to run are printed. Each can be run again: what is there stays, and is said.

mod init;
mod join;
mod reset;
mod systemd;

use std::path::{Path, PathBuf};

pub(crate) use init::Init;
pub(crate) use join::Join;
pub(crate) use reset::Reset;

use crate::failure::Failure;

/// Where the administrator's credentials are.
const KUBECONFIG: &str = "/etc/gantry/admin.kubeconfig";
/// What `gantry-agent join` leaves.
const JOINED: &str = "/etc/gantry/agent/client.pem";
/// What the agent knows its control plane by.
const SERVER: &str = "/etc/gantry/agent/server";
/// The control plane's data.
const CONTROL_DATA: &str = "/var/lib/gantry-control";

/// Where things are: below another root in tests.
#[derive(Debug, Clone)]
struct Places {
    root: PathBuf,
    bin: PathBuf,
}

impl Places {
    fn new(root: Option<&Path>) -> Result<Self, Failure> {
        let own = std::env::current_exe()
            .map_err(|error| Failure::local(format!("where is this program? {error}")))?;
        let bin = own.parent().unwrap_or(Path::new("/")).to_owned();
        for name in ["gantry-control", "gantry-agent"] {
            if !bin.join(name).is_file() {
                let bin = bin.display();
                let text =
                    format!("{name} is not in {bin}, where this program is: install them together");
                return Err(Failure::Local(text));
            }
        }
        let root = root.unwrap_or(Path::new("/")).to_owned();
        Ok(Self { root, bin })
    }

    /// An absolute path, below the root.
    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    fn program(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// Whether this is the machine itself.
    fn is_machine(&self) -> bool {
        self.root == Path::new("/")
    }
}

fn need_root(places: &Places) -> Result<(), Failure> {
    if places.is_machine() && !rustix::process::geteuid().is_root() {
        return Err(Failure::local("only root can do that: run it with sudo"));
    }
    Ok(())
}

/// The host's name, as a node's.
fn host_name() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().to_lowercase()
}

/// Whether systemd runs on this machine, and why not.
fn no_systemd(places: &Places, no_start: bool) -> Option<&'static str> {
    if no_start || !places.is_machine() {
        return Some("nothing is started, as --no-start says");
    }
    (!Path::new("/run/systemd/system").is_dir())
        .then_some("systemd does not run on this machine, so nothing is started")
}
