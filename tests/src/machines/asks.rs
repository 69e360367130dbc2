//! Faults that no program inside can make: asked of the process that runs the machines, over a serial
//! port (xtask/src/vm/asks.rs).

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// Where the kernel lists the ports by name.
const PORTS: &str = "/sys/class/virtio-ports";
const NAME: &str = "gantry.ask";

/// The open port.
pub struct Asks {
    out: File,
    answers: BufReader<File>,
    number: u32,
}

impl Asks {
    /// Opens the port of this machine.
    pub fn open() -> Result<Self> {
        let device = port(Path::new(PORTS))?;
        let out = File::options()
            .read(true)
            .write(true)
            .open(&device)
            .with_context(|| device.display().to_string())?;
        Ok(Self {
            answers: BufReader::new(out.try_clone()?),
            out,
            number: 0,
        })
    }

    /// Asks for one thing, and waits until it is done.
    pub fn ask(&mut self, words: &str) -> Result<()> {
        self.number += 1;
        let number = self.number;
        writeln!(self.out, "ask {number} {words}").with_context(|| words.to_owned())?;
        loop {
            let mut line = String::new();
            if self.answers.read_line(&mut line)? == 0 {
                bail!("{words}: nobody answers");
            }
            let Some(answer) = line.trim().strip_prefix(&format!("{number} ")) else {
                continue;
            };
            match answer {
                "ok" => return Ok(()),
                _ => bail!("{words}: {answer}"),
            }
        }
    }
}

fn port(ports: &Path) -> Result<PathBuf> {
    let entries = fs::read_dir(ports).with_context(|| ports.display().to_string())?;
    for entry in entries.flatten() {
        let name = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
        if name.trim() == NAME {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    bail!("no port {NAME} in {}", ports.display())
}
