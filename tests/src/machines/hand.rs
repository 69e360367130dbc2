//! What the scenarios on node-1 do on another machine: a program that runs there, and its client.
//!
//! ```text
//!  node-1: Machine::run(["sh", "-c", ..]) ─► TCP 7001, a line of JSON ─► hand: runs it ─► code, output
//!          Machine::start_agent(flags)    ─────────────────────────────► hand: keeps it running
//! ```
//! The hand is for `gantry-agent` what systemd is elsewhere: it starts the agent at boot when it has been
//! told to once, and again a second after it has died. What it was told is on the machine's disk.
//!
//! Only in virtual machines on a switch of their own: it does what anybody asks.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::cluster::{Installation, Output};

/// Where it listens.
const PORT: u16 = 7_001;
const DIRECTORY: &str = "/var/lib/machine";
/// An answer takes as long as what was asked for.
const ANSWER_LIMIT: Duration = Duration::from_secs(240);
/// After the agent has died.
const AGAIN: Duration = Duration::from_secs(1);
/// Bytes of a request.
const REQUEST_MAX: u64 = 1 << 20;

/// Another machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Its node's name.
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
}

impl Machine {
    /// Runs a command there to its end.
    pub fn run(&self, command: &[&str]) -> Result<Output> {
        self.run_with(command, "")
    }

    /// The same, with words on its standard input.
    pub fn run_with(&self, command: &[&str], input: &str) -> Result<Output> {
        let answer = self
            .ask(&json!({"run": command, "input": input}))
            .with_context(|| format!("{} on {}", command.join(" "), self.name))?;
        let text = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
        Ok(Output {
            code: answer["code"]
                .as_i64()
                .and_then(|code| i32::try_from(code).ok())
                .unwrap_or(-1),
            stdout: text("stdout"),
            stderr: text("stderr"),
        })
    }

    /// Runs a command there, which must succeed.
    pub fn ok(&self, command: &[&str]) -> Result<String> {
        let output = self.run(command)?;
        ensure!(
            output.code == 0,
            "{} on {} exited with {}: {}{}",
            command.join(" "),
            self.name,
            output.code,
            output.stdout,
            output.stderr
        );
        Ok(output.stdout)
    }

    /// Writes a file there, which only root reads.
    pub fn write(&self, path: &str, text: &str) -> Result<()> {
        let script = "umask 077; mkdir -p \"${0%/*}\" && cat > \"$0\"";
        let output = self.run_with(&["sh", "-c", script, path], text)?;
        ensure!(output.code == 0, "write {path}: {}", output.stderr);
        Ok(())
    }

    /// Starts `gantry-agent` there with these arguments, now and whenever it is not running.
    pub fn start_agent(&self, arguments: &[&str]) -> Result<()> {
        self.ask(&json!({"agent": arguments})).map(drop)
    }

    /// SIGKILL to the agent, which stays down.
    pub fn stop_agent(&self) -> Result<()> {
        self.ask(&json!({"agent": null})).map(drop)
    }

    /// Does its hand answer, with all images imported?
    pub fn is_up(&self) -> bool {
        let script = format!("test -e {DIRECTORY}/imported");
        self.run(&["sh", "-c", &script])
            .is_ok_and(|output| output.code == 0)
    }

    /// The end of its agent's log.
    pub fn last_words(&self) -> String {
        let script = format!("tail -n 25 {DIRECTORY}/agent.log");
        let said = self.run(&["sh", "-c", &script]);
        let said = said.map_or_else(|error| format!("{error:#}"), |output| output.stdout);
        format!("--- gantry-agent.log of {}\n{said}", self.name)
    }

    fn ask(&self, request: &Value) -> Result<Value> {
        let address = SocketAddr::new(self.address.into(), PORT);
        let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        writeln!(stream, "{request}")?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        let answer: Value = serde_json::from_str(&line).context("no answer")?;
        match answer["error"].as_str() {
            Some(words) => bail!("{words}"),
            None => Ok(answer),
        }
    }
}

/// The agent of this machine.
#[derive(Default)]
struct Agent {
    wanted: Option<Vec<String>>,
    child: Option<Child>,
}

/// Serves until the machine ends.
pub fn serve(installation: &Installation) -> Result<()> {
    fs::create_dir_all(DIRECTORY)?;
    // Of both families.
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
    let agent = Arc::new(Mutex::new(Agent {
        wanted: remembered()?,
        child: None,
    }));
    let bin = installation.bin.clone();
    let kept = Arc::clone(&agent);
    std::thread::spawn(move || keep_running(&kept, &bin));
    import(installation)?;
    for stream in listener.incoming().flatten() {
        let agent = Arc::clone(&agent);
        std::thread::spawn(move || answer(&stream, &agent));
    }
    Ok(())
}

/// All images, once.
fn import(installation: &Installation) -> Result<()> {
    let done = Path::new(DIRECTORY).join("imported");
    if done.exists() {
        return Ok(());
    }
    for archive in fs::read_dir(&installation.images)?.flatten() {
        let mut import = Command::new(installation.bin.join("gantry-agent"));
        let output = import
            .args(["image", "import"])
            .arg(archive.path())
            .output()?;
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "import: {words}");
    }
    Ok(File::create(done).and_then(|file| file.sync_all())?)
}

fn answer(stream: &TcpStream, agent: &Mutex<Agent>) {
    let mut line = String::new();
    let mut reader = BufReader::new(std::io::Read::take(stream, REQUEST_MAX));
    if reader.read_line(&mut line).is_err() || line.is_empty() {
        return;
    }
    let answer = act(&line, agent).unwrap_or_else(|error| json!({"error": format!("{error:#}")}));
    let mut out = stream;
    // Who has gone is not answered.
    let _ = writeln!(out, "{answer}");
}

fn act(line: &str, agent: &Mutex<Agent>) -> Result<Value> {
    let request: Value = serde_json::from_str(line)?;
    if let Some(wanted) = request.get("agent") {
        let wanted: Option<Vec<String>> = serde_json::from_value(wanted.clone())?;
        remember(wanted.as_ref())?;
        let mut agent = agent.lock().unwrap_or_else(PoisonError::into_inner);
        if wanted.is_none()
            && let Some(mut child) = agent.child.take()
        {
            child.kill()?;
            child.wait()?;
        }
        agent.wanted = wanted;
        return Ok(json!({}));
    }
    let command: Vec<String> = serde_json::from_value(request["run"].clone())?;
    let (program, arguments) = command.split_first().context("no command")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| program.clone())?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that reads nothing is none of ours.
        let _ = stdin.write_all(request["input"].as_str().unwrap_or_default().as_bytes());
    }
    let output = child.wait_with_output()?;
    Ok(json!({
        "code": output.status.code().unwrap_or(-1),
        "stdout": String::from_utf8_lossy(&output.stdout),
        "stderr": String::from_utf8_lossy(&output.stderr),
    }))
}

fn told() -> PathBuf {
    Path::new(DIRECTORY).join("agent.json")
}

fn remembered() -> Result<Option<Vec<String>>> {
    match fs::read(told()) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
        Err(_) => Ok(None),
    }
}

fn remember(wanted: Option<&Vec<String>>) -> Result<()> {
    let new = told().with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(json!(wanted).to_string().as_bytes())?;
    file.sync_all()?;
    fs::rename(&new, told())?;
    File::open(DIRECTORY)?.sync_all()?;
    Ok(())
}

fn keep_running(agent: &Mutex<Agent>, bin: &Path) {
    loop {
        {
            let mut agent = agent.lock().unwrap_or_else(PoisonError::into_inner);
            let ended = match &mut agent.child {
                Some(child) => child.try_wait().is_ok_and(|status| status.is_some()),
                None => true,
            };
            if ended && let Some(arguments) = agent.wanted.clone() {
                agent.child = start(bin, &arguments)
                    .inspect_err(|error| println!("vm: FAILED agent: {error:#}"))
                    .ok();
            }
        }
        std::thread::sleep(AGAIN);
    }
}

fn start(bin: &Path, arguments: &[String]) -> Result<Child> {
    let log = Path::new(DIRECTORY).join("agent.log");
    let log = File::options().create(true).append(true).open(log)?;
    let child = Command::new(bin.join("gantry-agent"))
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()?;
    Ok(child)
}
