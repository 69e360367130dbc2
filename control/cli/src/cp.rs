//! `gantry cp`: files between this machine and a container, as a tar stream through exec.
//!
//! ```text
//! pod:/a ./b     tar cf - -C / a ──► stdout ──► extract (this machine; confined, see extract.rs)
//! ./a pod:/b     pack ──► stdin ──► tar xmf - -C /     (the container; needs tar in it)
//! ```

mod extract;

use crate::connection::Session;
use crate::failure::Failure;
use crate::logs::resolve_pod;
use crate::streams::{self, Remote, STDIN_CHUNK_BYTES};
use crate::{Global, exec};
use clap::Args;
use gantry_api::kinds::resolve;
use gantry_api::proto::{ExecExit, ExecInput, ExecStart, exec_input, exec_output};
use serde_json::Value;
use std::io::{Read, Write};
use std::path::{Component, Path, PathBuf};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;

/// Chunks between the network and the disk.
const QUEUE: usize = 16;
/// What a tar that fails says is kept up to this.
const WORDS_BYTES_MAX: usize = 4096;

#[derive(Args, Debug)]
pub(crate) struct Cp {
    /// A local path, or [namespace/]pod:path
    from: String,
    /// A local path, or [namespace/]pod:path
    to: String,
    /// Container
    #[arg(short, long)]
    container: Option<String>,
    /// Owner and permissions are not copied
    #[arg(long)]
    no_preserve: bool,
}

/// One end of a copy.
#[derive(Debug, PartialEq, Eq)]
enum Place<'a> {
    Local(&'a Path),
    Pod {
        namespace: Option<&'a str>,
        pod: &'a str,
        path: &'a str,
    },
}

/// Reads `[[namespace/]pod:]path`. What starts like a path is one, colons or not.
fn place(text: &str) -> Result<Place<'_>, Failure> {
    let local = text.starts_with(['/', '.']) || !text.contains(':');
    let Some((pod, path)) = text.split_once(':').filter(|_| !local) else {
        return match text {
            "" => Err(Failure::local("filepath can not be empty")),
            _ => Ok(Place::Local(Path::new(text))),
        };
    };
    let (namespace, pod) = match pod.split_once('/') {
        Some((namespace, pod)) => (Some(namespace), pod),
        None => (None, pod),
    };
    if pod.is_empty() || path.is_empty() || namespace == Some("") || pod.contains('/') {
        let text = format!("{text:?}: write a local path, or [namespace/]pod:path");
        return Err(Failure::Local(text));
    }
    Ok(Place::Pod {
        namespace,
        pod,
        path,
    })
}

/// A path in a container without `.`, `..` and empty parts, relative to its root; tar's own words
/// about a leading slash are avoided that way, and what comes back has exactly this prefix.
fn clean(path: &str) -> PathBuf {
    let mut clean = PathBuf::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => clean.push(name),
            Component::ParentDir => {
                clean.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    clean
}

impl Cp {
    pub(crate) async fn run(&self, global: &Global) -> Result<(), Failure> {
        match (place(&self.from)?, place(&self.to)?) {
            (
                Place::Local(from),
                Place::Pod {
                    namespace,
                    pod,
                    path,
                },
            ) => {
                let (session, pod) = open(global, namespace, pod).await?;
                self.push(&session, &pod, from, path).await
            }
            (
                Place::Pod {
                    namespace,
                    pod,
                    path,
                },
                Place::Local(to),
            ) => {
                let (session, pod) = open(global, namespace, pod).await?;
                self.pull(&session, &pod, path, to).await
            }
            (Place::Local(_), Place::Local(_)) => Err(Failure::local(
                "one of src or dest must be a remote file specification ([namespace/]pod:path)",
            )),
            (Place::Pod { .. }, Place::Pod { .. }) => Err(Failure::local(
                "one of src or dest must be a local file specification",
            )),
        }
    }

    fn start(
        &self,
        session: &Session,
        pod: &Value,
        command: &[&str],
        stdin: bool,
    ) -> Result<ExecStart, Failure> {
        let mut start = exec::start(session, pod, self.container.as_deref(), "copy files of")?;
        start.command = command.iter().map(|&word| word.to_owned()).collect();
        start.stdin = stdin;
        Ok(start)
    }

    async fn push(
        &self,
        session: &Session,
        pod: &Value,
        from: &Path,
        to: &str,
    ) -> Result<(), Failure> {
        let metadata = std::fs::symlink_metadata(from)
            .map_err(|e| Failure::Local(format!("cannot read {}: {e}", from.display())))?;
        let mut target = clean(to);
        // Into a directory that is there, under its own name.
        let test = self.start(session, pod, &["test", "-d", to], false)?;
        if finish(Remote::open(session, test).await?).await?.0.code == 0 {
            let real = from.canonicalize()?;
            target.push(
                real.file_name()
                    .ok_or_else(|| Failure::local("/ has no name to copy it under"))?,
            );
        }
        let Some(name) = target.file_name().map(PathBuf::from) else {
            return Err(Failure::local(
                "the container's / cannot be replaced by a file",
            ));
        };
        let parent = Path::new("/").join(target.parent().unwrap_or(Path::new("")));
        let parent = parent.to_string_lossy();
        let mut command = vec!["tar"];
        if self.no_preserve {
            command.extend(["--no-same-permissions", "--no-same-owner"]);
        }
        command.extend(["-xmf", "-", "-C", &parent]);
        let remote = Remote::open(session, self.start(session, pod, &command, true)?).await?;
        let (input, from) = (remote.input.clone(), from.to_owned());
        let packed = tokio::task::spawn_blocking(move || {
            let mut archive = tar::Builder::new(ToRemote(input));
            archive.follow_symlinks(false);
            match metadata.is_dir() {
                true => archive.append_dir_all(name, &from)?,
                false => archive.append_path_with_name(&from, name)?,
            }
            archive.finish()
        });
        let (exit, words) = finish(remote).await?;
        let packed = packed.await.map_err(|e| Failure::Local(e.to_string()))?;
        // What the container says explains why nobody took the rest.
        ended(&exit, &words)?;
        packed.map_err(|e| Failure::Local(format!("cannot send: {e}")))
    }

    async fn pull(
        &self,
        session: &Session,
        pod: &Value,
        from: &str,
        to: &Path,
    ) -> Result<(), Failure> {
        let prefix = clean(from);
        let name = prefix.to_string_lossy().into_owned();
        let name = if name.is_empty() { "." } else { &name };
        let command = ["tar", "cf", "-", "-C", "/", "--", name];
        let mut remote = Remote::open(session, self.start(session, pod, &command, false)?).await?;
        let (sender, receiver) = mpsc::channel(QUEUE);
        let (to, keep_modes) = (to.to_owned(), !self.no_preserve);
        let extracted = tokio::task::spawn_blocking(move || {
            let from = FromRemote {
                chunks: receiver,
                chunk: Vec::new(),
                at: 0,
            };
            extract::extract(from, &prefix, &to, keep_modes)
        });
        let mut words = Vec::new();
        let exit = loop {
            match remote.output.next().await {
                Some(message) => match message?.output {
                    Some(exec_output::Output::Stdout(data)) => {
                        // An extraction that has failed reads no more; its error is told below.
                        let _ = sender.send(data.to_vec()).await;
                    }
                    Some(exec_output::Output::Stderr(data)) => keep(&mut words, &data),
                    Some(exec_output::Output::Exit(exit)) => break exit,
                    None => {}
                },
                None => {
                    return Err(Failure::local(
                        "the connection closed before the copy ended",
                    ));
                }
            }
        };
        drop(sender);
        let extracted = extracted.await.map_err(|e| Failure::Local(e.to_string()))?;
        ended(&exit, &words)?;
        for skipped in extracted? {
            eprintln!("warning: {skipped}");
        }
        Ok(())
    }
}

async fn open(
    global: &Global,
    namespace: Option<&str>,
    pod: &str,
) -> Result<(Session, Value), Failure> {
    let mut global = global.clone();
    if let Some(namespace) = namespace {
        global.namespace = Some(namespace.to_owned());
    }
    let kind = resolve("pods").ok_or_else(|| Failure::local("this build does not know pods"))?;
    let session = Session::open(&global).await?;
    let pod = resolve_pod(&session, kind, pod).await?;
    Ok((session, pod))
}

fn keep(words: &mut Vec<u8>, data: &[u8]) {
    let room = WORDS_BYTES_MAX.saturating_sub(words.len());
    words.extend_from_slice(&data[..data.len().min(room)]);
}

/// Waits for a command's end; returns what it said on stderr.
async fn finish(mut remote: Remote) -> Result<(ExecExit, Vec<u8>), Failure> {
    let mut words = Vec::new();
    while let Some(message) = remote.output.next().await {
        match message?.output {
            Some(exec_output::Output::Stderr(data)) => keep(&mut words, &data),
            Some(exec_output::Output::Exit(exit)) => return Ok((exit, words)),
            _ => {}
        }
    }
    Err(Failure::local(
        "the connection closed before the copy ended",
    ))
}

fn ended(exit: &ExecExit, words: &[u8]) -> Result<(), Failure> {
    if exit.code == 0 && exit.message.is_empty() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(words);
    Err(Failure::Local(match exit.message.as_str() {
        "" => format!(
            "tar in the container ended with {}: {}",
            exit.code,
            words.trim_end()
        ),
        message => format!("cannot run tar in the container: {message}"),
    }))
}

/// The container's stdin, for a thread.
struct ToRemote(mpsc::Sender<ExecInput>);

impl Write for ToRemote {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let part = &data[..data.len().min(STDIN_CHUNK_BYTES)];
        let message = streams::input(exec_input::Input::Stdin(part.to_vec().into()));
        let sent = self.0.blocking_send(message);
        sent.map_err(|_| std::io::ErrorKind::BrokenPipe)?;
        Ok(part.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Drop for ToRemote {
    fn drop(&mut self) {
        let _ = self
            .0
            .blocking_send(streams::input(exec_input::Input::StdinClosed(true)));
    }
}

/// The container's stdout, for a thread.
struct FromRemote {
    chunks: mpsc::Receiver<Vec<u8>>,
    chunk: Vec<u8>,
    at: usize,
}

impl Read for FromRemote {
    fn read(&mut self, to: &mut [u8]) -> std::io::Result<usize> {
        while self.at == self.chunk.len() {
            match self.chunks.blocking_recv() {
                Some(chunk) => (self.chunk, self.at) = (chunk, 0),
                None => return Ok(0),
            }
        }
        let n = to.len().min(self.chunk.len() - self.at);
        to[..n].copy_from_slice(&self.chunk[self.at..self.at + n]);
        self.at += n;
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn places_are_kubectls() {
        let pod = |namespace, pod, path| Place::Pod {
            namespace,
            pod,
            path,
        };
        for (text, want) in [
            ("a", Place::Local(Path::new("a"))),
            ("./a:b", Place::Local(Path::new("./a:b"))),
            ("/a:b", Place::Local(Path::new("/a:b"))),
            ("web:/tmp", pod(None, "web", "/tmp")),
            ("shop/web:tmp/x:y", pod(Some("shop"), "web", "tmp/x:y")),
        ] {
            assert_eq!(place(text).unwrap(), want, "{text}");
        }
        for text in ["", ":x", "web:", "/:", "a/b/c:x", "n/:x"] {
            assert!(place(text).is_err() || text == "/:", "{text}");
        }
    }

    proptest! {
        #[test]
        fn a_clean_path_stays_below_the_root(path in "[a./]{0,20}") {
            let clean = clean(&path);
            prop_assert!(clean.components().all(|c| matches!(c, Component::Normal(_))));
        }
    }
}
