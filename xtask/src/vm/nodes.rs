//! Several machines on one [`Switch`]: a control plane and workers, with power that can be cut.
//!
//! ```text
//!  console lines of each ─┐                      ┌─► node-N.log, verdicts of node-1
//!                         ├─► one loop, one queue ┤
//!  asks of node-1 ────────┘                      └─► the switch, a QEMU that ends or starts
//! ```
//! All machines boot the same kernel and initramfs; the kernel's command line says which one it is.
//! node-1 carries the control plane and runs the scenarios. Each worker has a disk of its own, which
//! outlives its power; node-1 has none.
//!
//! Addresses: 10.0.SEGMENT.(10 + number), the router is 10.0.SEGMENT.1.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use super::asks::{self, Ask};
use super::router::Host;
use super::switch::{Plug, Switch};
use super::{LIMIT, Outcome, directory, guest, kubeconfig};
use crate::up::Cluster;
use crate::{report, run};

/// Bytes of a worker's disk; sparse.
const DISK: u64 = 4 << 30;
/// MiB of the machine with the control plane, whose files are all in memory, and of the others.
const MEMORY: [&str; 2] = ["2560", "1536"];
/// Where the machine with the control plane is in the network that leads to the host.
const HOST_SIDE: &str = "10.0.9.15";

/// What is done with a cluster that is up.
pub type Then<'a> = &'a dyn Fn() -> Result<()>;

/// Which machines, and what they boot.
pub struct Plan<'a> {
    /// `kvm` or `tcg`.
    pub accelerator: &'a str,
    /// The kernel's image.
    pub kernel: &'a Path,
    /// The initramfs.
    pub initrd: &'a Path,
    /// How many.
    pub count: usize,
    /// So many of the last ones are behind the router.
    pub routed: usize,
    /// A scenario's name, `all` or `short`.
    pub scenarios: &'a str,
    /// Of them those that have been run, with commas.
    pub told: &'a str,
    /// Their boot, from 1 on: each writes consoles of its own.
    pub boot: usize,
    /// The cluster stays up at the end.
    pub keep: bool,
    /// With `keep`: what this host does with the cluster first.
    pub then: Option<Then<'a>>,
    /// Every console is shown.
    pub console: bool,
}

/// What the loop hears.
enum Heard {
    /// A line of a machine's console.
    Line(usize, String),
    /// A line of node-1's asks.
    Ask(String),
}

struct Machines<'a> {
    plan: &'a Plan<'a>,
    switch: Switch,
    sockets: PathBuf,
    tell: Sender<Heard>,
    running: Vec<Option<Child>>,
    logs: Vec<File>,
    /// Where the host reaches the API, with `keep`.
    api_port: Option<u16>,
    /// Ctrl-C and SIGTERM: the end is ours to make.
    told: SigSet,
    signals: SignalFd,
}

/// Boots all, follows the scenarios, and leaves nothing. How long a processor has stood still, if one has.
pub fn run(plan: &Plan, outcome: &mut Outcome) -> Result<Option<u64>> {
    let (tell, heard) = channel();
    let mut machines = Machines::prepare(plan, tell)?;
    let answers = listen(&machines.sockets.join("ask"), machines.tell.clone())?;
    for index in 0..plan.count {
        machines.start(index)?;
    }
    let began = Instant::now();
    let still_s = machines.follow(&heard, &answers, outcome, began);
    if !outcome.ended {
        println!(
            "FAILED vm: the machines said no end after {} s; their consoles are in {}",
            began.elapsed().as_secs(),
            directory().display()
        );
    }
    if plan.keep && outcome.ended {
        if let Some(then) = plan.then {
            then()?;
        }
        machines.wait_to_be_told(&heard);
    }
    Ok(still_s)
}

/// node-1's serial port: its lines are heard, the answers are written to what comes back.
fn listen(path: &Path, tell: Sender<Heard>) -> Result<Receiver<UnixStream>> {
    let listener =
        UnixListener::bind(path).with_context(|| format!("listen on {}", path.display()))?;
    let (connected, answers) = channel();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let Ok(own) = stream.try_clone() else { return };
            if connected.send(own).is_err() {
                return;
            }
            for line in BufReader::new(stream).lines().map_while(Result::ok) {
                if tell.send(Heard::Ask(line)).is_err() {
                    return;
                }
            }
        }
    });
    Ok(answers)
}

impl<'a> Machines<'a> {
    fn prepare(plan: &'a Plan<'a>, tell: Sender<Heard>) -> Result<Self> {
        // Before the first thread, which takes over what is blocked.
        let mut told = SigSet::empty();
        told.add(Signal::SIGINT);
        told.add(Signal::SIGTERM);
        told.thread_block()?;
        let signals = SignalFd::with_flags(&told, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        // Not in target/: a socket's path has 107 bytes at most.
        let sockets = std::env::temp_dir().join(format!("gantry-vm-{}", std::process::id()));
        // Of a process that had this id, and was killed.
        let _ = std::fs::remove_dir_all(&sockets);
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&sockets)
            .with_context(|| format!("create {}", sockets.display()))?;
        let plugs = (0..plan.count).map(|index| plan.plug(index)).collect();
        let switch = Switch::start(&sockets, plugs)?;
        let mut logs = Vec::new();
        for index in 0..plan.count {
            let name = match plan.boot {
                1 => format!("node-{}.log", index + 1),
                boot => format!("node-{}.boot-{boot}.log", index + 1),
            };
            let path = directory().join(name);
            logs.push(File::create(&path).with_context(|| path.display().to_string())?);
            if index > 0 {
                make_disk(&disk(index))?;
            }
        }
        Ok(Self {
            plan,
            switch,
            sockets,
            tell,
            running: (0..plan.count).map(|_| None).collect(),
            logs,
            api_port: plan.keep.then(free_port).transpose()?,
            told,
            signals,
        })
    }

    fn start(&mut self, index: usize) -> Result<()> {
        if self.running[index].is_some() {
            return Ok(());
        }
        let plan = self.plan;
        let segments: Vec<String> = (0..plan.count)
            .map(|index| plan.segment(index).to_string())
            .collect();
        let keep = if plan.keep { " gantry.keep" } else { "" };
        let words = format!(
            "gantry.node={} gantry.segments={} gantry.scenario={} gantry.told={}{keep}",
            index + 1,
            segments.join(","),
            plan.scenarios,
            plan.told
        );
        let mut qemu = guest::qemu(plan.accelerator, plan.kernel, &words);
        qemu.arg("-initrd").arg(plan.initrd);
        qemu.args(["-m", MEMORY[usize::from(index > 0)]]);
        let [a, b, c, d, e, f] = plan.plug(index).host.mac;
        let socket = self.switch.socket(index);
        qemu.arg("-netdev").arg(format!(
            "stream,id=link,server=off,addr.type=unix,addr.path={}",
            socket.display()
        ));
        qemu.arg("-device").arg(format!(
            "virtio-net-pci,netdev=link,romfile=,mac={a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}"
        ));
        if let Some(port) = self.api_port.filter(|_| index == 0) {
            qemu.arg("-netdev").arg(format!(
                "user,id=host,restrict=on,net=10.0.9.0/24,hostfwd=tcp:127.0.0.1:{port}-{HOST_SIDE}:6443"
            ));
            qemu.args(["-device", "virtio-net-pci,netdev=host,romfile="]);
        }
        if index == 0 {
            let ask = self.sockets.join("ask");
            qemu.arg("-chardev")
                .arg(format!("socket,id=ask,path={}", ask.display()));
            qemu.args(["-device", "virtio-serial-pci"]);
            qemu.args(["-device", "virtserialport,chardev=ask,name=gantry.ask"]);
        } else {
            // A power cut ends QEMU, not this host: what the guest has flushed is in the file.
            qemu.arg("-drive").arg(format!(
                "file={},if=none,id=disk,format=raw,cache=unsafe",
                disk(index).display()
            ));
            qemu.args(["-device", "virtio-blk-pci,drive=disk"]);
        }
        let tell = self.tell.clone();
        let child = guest::spawn(qemu, move |line| {
            tell.send(Heard::Line(index, line)).is_ok()
        })?;
        self.running[index] = Some(child);
        Ok(())
    }

    fn stop(&mut self, index: usize) {
        if let Some(mut child) = self.running[index].take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    fn follow(
        &mut self,
        heard: &Receiver<Heard>,
        answers: &Receiver<UnixStream>,
        outcome: &mut Outcome,
        began: Instant,
    ) -> Option<u64> {
        let mut out = None;
        while !outcome.ended {
            // Whether one has ended by itself is asked here: of that there is no line.
            let ended = self.ended();
            let left = LIMIT.saturating_sub(began.elapsed());
            let wait = left.min(Duration::from_millis(500));
            if self.told_to_end() {
                return None;
            }
            match heard.recv_timeout(wait) {
                Ok(Heard::Line(index, line)) => {
                    self.line(index, &line, outcome);
                    if let Some(seconds) = guest::stands_still(&line) {
                        println!("FAILED vm node-{}: stands still for {seconds} s", index + 1);
                        return Some(seconds);
                    }
                }
                Ok(Heard::Ask(line)) => {
                    out = answers.try_iter().last().or(out);
                    let Some((number, ask)) = asks::parse(&line, self.plan.count) else {
                        continue;
                    };
                    let done = ask.and_then(|ask| self.act(ask).map_err(|e| format!("{e:#}")));
                    let answer = match done {
                        Ok(()) => format!("{number} ok\n"),
                        Err(words) => format!("{number} error {}\n", words.replace('\n', " ")),
                    };
                    if let Some(out) = &mut out {
                        // A guest that has just died asks no more.
                        let _ = out.write_all(answer.as_bytes());
                    }
                }
                Err(_) if left.is_zero() => return None,
                Err(_) => {
                    if let Some(index) = ended {
                        let words = format!("node-{}: ended by itself", index + 1);
                        println!("FAILED vm {words}");
                        outcome.fail(&words);
                        return None;
                    }
                }
            }
        }
        None
    }

    fn line(&mut self, index: usize, line: &str, outcome: &mut Outcome) {
        // A full disk of the host is not what is tested.
        let _ = writeln!(self.logs[index], "{line}");
        if self.plan.console {
            println!("  {} | {line}", index + 1);
        }
        outcome.verdict(line);
    }

    fn act(&mut self, ask: Ask) -> Result<()> {
        match ask {
            Ask::PowerCut(index) => self.stop(index),
            Ask::PowerOn(index) => {
                // It may have ended by itself: the guest's own reboot ends QEMU.
                if let Some(child) = &mut self.running[index]
                    && child.try_wait()?.is_some()
                {
                    self.running[index] = None;
                }
                self.start(index)?;
            }
            Ask::Isolate(index) => self.switch.isolate(index),
            Ask::Cut(a, b) => self.switch.cut(a, b),
            Ask::Delay(index, by) => self.switch.delay(index, by),
            Ask::Lose(index, percent) => self.switch.lose(index, percent),
            Ask::Heal => self.switch.heal(),
            Ask::Begin => self.switch.forget(),
            Ask::Capture(name) => {
                let capture = directory().join(format!("{name}.pcap"));
                self.switch.capture(&capture)?;
                let shown = capture.display();
                report::note(format!("what passed the switch is in {shown}"));
            }
            Ask::Passed(words) => ensure!(
                self.switch.has_passed(words.as_bytes()),
                "{words}: no frame has it"
            ),
            Ask::Kubeconfig(base64) => self.kubeconfig(&base64)?,
        }
        Ok(())
    }

    fn kubeconfig(&self, base64: &str) -> Result<()> {
        let port = self.api_port.context("only with --keep")?;
        let mut decode = run::program("base64", ["-d"]);
        decode.stdin(std::process::Stdio::piped());
        decode.stdout(std::process::Stdio::piped());
        let mut child = decode.spawn().context("base64")?;
        child
            .stdin
            .take()
            .context("base64 has no input")?
            .write_all(base64.as_bytes())?;
        let text = String::from_utf8(child.wait_with_output()?.stdout)?;
        let lines = text.lines().map(|line| match line.split_once("server: ") {
            Some((before, _)) => format!("{before}server: https://127.0.0.1:{port}"),
            None => line.to_owned(),
        });
        let cluster = Cluster {
            bin: run::target().join("test/bin"),
            kubeconfig: kubeconfig(),
        };
        let text = lines.collect::<Vec<_>>().join("\n") + "\n";
        let mut file = File::options();
        // It is the administrator's.
        let file = file.write(true).create(true).truncate(true).mode(0o600);
        let path = &cluster.kubeconfig;
        let mut file = file
            .open(path)
            .with_context(|| path.display().to_string())?;
        file.write_all(text.as_bytes())?;
        let env = directory().join("env");
        cluster.write_env(&env)?;
        if self.plan.then.is_none() {
            println!(
                "==> the cluster is up. From another terminal:\n    . {}\n    gantry get nodes -o wide",
                env.display()
            );
        }
        Ok(())
    }

    /// Until Ctrl-C or SIGTERM, or until no machine is left that could be asked. Consoles are written on.
    fn wait_to_be_told(&mut self, heard: &Receiver<Heard>) {
        println!(
            "    Ctrl-C or `cargo xtask vm-test --stop` ends the machines; their consoles are in {}",
            directory().display()
        );
        while !self.told_to_end() {
            if let Ok(Heard::Line(index, line)) = heard.recv_timeout(Duration::from_millis(200)) {
                let _ = writeln!(self.logs[index], "{line}");
            }
            if let Some(index) = self.ended() {
                println!("FAILED vm node-{}: ended by itself", index + 1);
                return;
            }
        }
    }

    /// A machine that has ended and was not told to.
    fn ended(&mut self) -> Option<usize> {
        self.running.iter_mut().position(|child| {
            let status = child.as_mut().map(|child| child.try_wait());
            status.is_some_and(|status| status.is_ok_and(|status| status.is_some()))
        })
    }

    fn told_to_end(&self) -> bool {
        matches!(self.signals.read_signal(), Ok(Some(_)))
    }
}

impl Drop for Machines<'_> {
    fn drop(&mut self) {
        for index in 0..self.running.len() {
            self.stop(index);
        }
        if self.switch.dropped() > 0 {
            let dropped = self.switch.dropped();
            report::note(format!("the switch dropped {dropped} frames: full queues"));
        }
        let _ = std::fs::remove_dir_all(&self.sockets);
        let _ = self.told.thread_unblock();
    }
}

impl Plan<'_> {
    fn segment(&self, index: usize) -> u8 {
        if index + self.routed >= self.count && index > 0 {
            2
        } else {
            1
        }
    }

    fn plug(&self, index: usize) -> Plug {
        let (segment, number) = (self.segment(index), index as u8 + 1);
        let host = Host {
            address: Ipv4Addr::new(10, 0, segment, 10 + number),
            mac: [0x52, 0x54, 0, 0, segment, 10 + number],
        };
        Plug { host, segment }
    }
}

fn disk(index: usize) -> PathBuf {
    directory().join(format!("node-{}.disk", index + 1))
}

fn make_disk(path: &Path) -> Result<()> {
    let file = File::create(path).with_context(|| path.display().to_string())?;
    file.set_len(DISK)?;
    let mkfs = run::which("mkfs.ext4").context("no mkfs.ext4 (package e2fsprogs)")?;
    let mut mkfs = std::process::Command::new(mkfs);
    mkfs.args(["-q", "-F", "-E", "lazy_itable_init=1,lazy_journal_init=1"]);
    run::captured(mkfs.arg(path))?;
    Ok(())
}

/// A port of the host that nobody has at this moment.
fn free_port() -> Result<u16> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    Ok(listener.local_addr()?.port())
}
