//! What a daemon tells its service manager: sd_notify, without the C library.
//!
//! ```text
//!  NOTIFY_SOCKET, WATCHDOG_USEC ─► READY=1 ─► WATCHDOG=1 at a third of the time ─► STOPPING=1
//! ```
//! Without a service manager nothing is said and nothing fails. Who stops saying WATCHDOG=1 is ended and
//! started again, so it is said by a task of the daemon's own runtime: one that hangs says nothing.
//!
//! Source: sd_notify(3), sd_watchdog_enabled(3).

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The way to the service manager, if there is one.
#[derive(Debug, Default)]
pub struct ServiceManager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// As the environment of this process says.
    pub fn from_environment() -> Self {
        Self::new(
            std::env::var_os("NOTIFY_SOCKET").as_deref(),
            std::env::var_os("WATCHDOG_USEC").as_deref(),
            std::env::var_os("WATCHDOG_PID").as_deref(),
            std::process::id(),
        )
    }

    fn new(
        socket: Option<&OsStr>,
        watchdog_usec: Option<&OsStr>,
        watchdog_pid: Option<&OsStr>,
        own_pid: u32,
    ) -> Self {
        let text = |value: Option<&OsStr>| value.and_then(OsStr::to_str).map(str::to_owned);
        let is_ours = text(watchdog_pid).is_none_or(|pid| pid.parse() == Ok(own_pid));
        let usec = text(watchdog_usec).and_then(|usec| usec.parse::<u64>().ok());
        Self {
            socket: socket.and_then(|path| Some((UnixDatagram::unbound().ok()?, address(path)?))),
            watchdog: usec
                .filter(|usec| is_ours && *usec > 0)
                .map(Duration::from_micros),
        }
    }

    /// How often [`ServiceManager::alive`] wants to be called; `None`: nobody asks.
    pub fn interval(&self) -> Option<Duration> {
        let watchdog = self.watchdog.filter(|_| self.socket.is_some())?;
        Some((watchdog / 3).max(Duration::from_millis(10)))
    }

    /// The start is done.
    pub fn ready(&self, status: &str) {
        self.say(&format!("READY=1\nSTATUS={}", status.replace('\n', " ")));
    }

    /// Still there.
    pub fn alive(&self) {
        self.say("WATCHDOG=1");
    }

    /// The end has begun.
    pub fn stopping(&self) {
        self.say("STOPPING=1");
    }

    fn say(&self, words: &str) {
        if let Some((socket, address)) = &self.socket {
            // A manager that does not listen is no reason to end.
            let _ = socket.send_to_addr(words.as_bytes(), address);
        }
    }
}

/// A path, or after `@` a name in the abstract namespace.
fn address(text: &OsStr) -> Option<SocketAddr> {
    use std::os::linux::net::SocketAddrExt as _;
    match text.as_bytes() {
        [b'/', ..] => SocketAddr::from_pathname(OsString::from(text)).ok(),
        [b'@', name @ ..] if !name.is_empty() => SocketAddr::from_abstract_name(name).ok(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory that goes with the test.
    struct Directory(std::path::PathBuf);

    impl Drop for Directory {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_manager_hears_ready_alive_and_the_end() {
        let directory = std::env::temp_dir().join(format!("gantry-notify-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let directory = Directory(directory);
        let path = directory.0.join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        let own = std::process::id();
        let usec = OsStr::new("3000000");
        let daemon = ServiceManager::new(Some(path.as_os_str()), Some(usec), None, own);
        assert_eq!(daemon.interval(), Some(Duration::from_secs(1)));
        daemon.ready("serving\non 6443");
        daemon.alive();
        daemon.stopping();
        let mut heard = Vec::new();
        for _ in 0..3 {
            let mut bytes = [0; 100];
            let length = manager.recv(&mut bytes).unwrap();
            heard.push(String::from_utf8_lossy(&bytes[..length]).into_owned());
        }
        assert_eq!(
            heard,
            [
                "READY=1\nSTATUS=serving on 6443",
                "WATCHDOG=1",
                "STOPPING=1"
            ]
        );
    }

    #[test]
    fn a_name_in_the_abstract_namespace_is_an_address_too() {
        use std::os::linux::net::SocketAddrExt as _;
        let name = format!("gantry-notify-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        let text = OsString::from(format!("@{name}"));
        ServiceManager::new(Some(&text), None, None, 1).ready("");
        let mut bytes = [0; 100];
        let length = manager.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..length], b"READY=1\nSTATUS=");
    }

    #[test]
    fn without_a_manager_or_with_another_processs_watchdog_nothing_is_asked() {
        let none = ServiceManager::new(None, Some(OsStr::new("1000000")), None, 1);
        assert_eq!(none.interval(), None);
        none.ready("x");
        let at = |usec: &str, pid: &str| {
            let at = OsStr::new("/nonexistent/socket");
            let (usec, pid) = (OsStr::new(usec), OsStr::new(pid));
            let manager = ServiceManager::new(Some(at), Some(usec), Some(pid), 7);
            manager.alive(); // nobody listens: no failure
            manager.interval()
        };
        assert!(at("1000000", "7").is_some());
        assert_eq!(at("1000000", "8"), None);
        assert_eq!(at("0", "7"), None);
        assert_eq!(at("x", "7"), None);
        assert!(address(OsStr::new("relative")).is_none() && address(OsStr::new("@")).is_none());
    }
}
