//! `gantry images`: what is on the nodes, and what is done to it, with a progress bar each.
//!
//! ```text
//! nodes (all, or --node) ─► a stream to each, side by side ─► progress ─► bar (stderr, terminals only)
//!                                                         └─► the end  ─► table or lines (stdout)
//! ```
//! A node that refuses is told by name, the others go on, and the exit code is 1.

mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use futures_util::future::join_all;
use gantry_api::kinds::resolve;
use gantry_api::proto::images_answer::Answer;
use gantry_api::proto::images_request::Action as Asked;
use gantry_api::proto::{
    ImagesDone, ImagesInput, ImagesRequest, ImportImages, ListImages, ListRequest, PinImage,
    PruneImages, PullImage, RemoveImage, images_input,
};
use indicatif::{HumanBytes, MultiProgress, ProgressBar, ProgressStyle};
use serde_json::Value;
use tokio::io::AsyncReadExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use crate::Global;
use crate::connection::Session;
use crate::failure::Failure;
use crate::output;

/// One HTTP/2 frame.
const CHUNK_BYTES: usize = 16 << 10;
/// Chunks on their way to the server.
const QUEUE: usize = 16;

#[derive(Args, Debug)]
pub(crate) struct Images {
    /// These nodes only; all of them otherwise
    #[arg(long = "node", value_name = "NAME", global = true)]
    nodes: Vec<String>,
    #[command(flatten)]
    show: Show,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(Args, Debug)]
struct Show {
    /// wide: also whole digests and IDs
    #[arg(short, long, default_value = "", hide_default_value = true, value_parser = ["", "wide"], global = true)]
    output: String,
    /// No line with the columns' names
    #[arg(long, global = true)]
    no_headers: bool,
}

#[derive(Subcommand, Debug)]
enum Action {
    /// List them (what `gantry images` alone does)
    #[command(visible_alias = "list")]
    Ls,
    /// Get an image from its registry
    Pull {
        /// As a pod would name it
        name: String,
        /// Pull secret of the namespace
        #[arg(long)]
        secret: Option<String>,
    },
    /// Send an archive (OCI or docker save) and import what it holds
    Import {
        /// The file
        file: PathBuf,
    },
    /// Take a name away; with its last one the image goes
    Rm {
        /// Names as a pod has them, or IDs
        #[arg(required = true)]
        names: Vec<String>,
    },
    /// Remove what no pod uses and nobody has used for some minutes, except pinned images
    Prune,
    /// Keep an image whatever happens to the disk
    Pin {
        /// As a pod has it, or an ID
        name: String,
        /// No longer
        #[arg(long)]
        off: bool,
    },
}

/// What is asked of every node.
struct Wish {
    action: Asked,
    /// Sent after it.
    archive: Option<PathBuf>,
    /// Before a progress bar; none: it takes no time.
    title: Option<String>,
}

impl Wish {
    fn plain(action: Asked) -> Self {
        Self {
            action,
            archive: None,
            title: None,
        }
    }
}

impl Images {
    pub(crate) async fn run(&self, global: &Global) -> Result<ExitCode, Failure> {
        let session = Session::open(global).await?;
        let nodes = match self.nodes.is_empty() {
            true => all_nodes(&session).await?,
            false => self.nodes.clone(),
        };
        let mut code = ExitCode::SUCCESS;
        for wish in self.wishes(&session).await? {
            let answers = ask_all(&session, &nodes, &wish).await;
            let mut done = Vec::new();
            for (node, answer) in nodes.iter().zip(answers) {
                match answer {
                    Ok(answer) => done.push((node.as_str(), answer)),
                    Err(failure) => {
                        eprintln!("{node}: {failure}");
                        code = ExitCode::FAILURE;
                    }
                }
            }
            self.print(&done)?;
        }
        Ok(code)
    }

    async fn wishes(&self, session: &Session) -> Result<Vec<Wish>, Failure> {
        Ok(match &self.action {
            None | Some(Action::Ls) => vec![Wish::plain(Asked::List(ListImages {}))],
            Some(Action::Pull { name, secret }) => {
                let secret_json = match secret {
                    Some(secret) => secret_json(session, secret).await?,
                    None => Vec::new(),
                };
                let pull = PullImage {
                    name: name.clone(),
                    secret_json: secret_json.into(),
                };
                vec![Wish {
                    title: Some(format!("pulling {name}")),
                    ..Wish::plain(Asked::Pull(pull))
                }]
            }
            Some(Action::Import { file }) => vec![Wish {
                archive: Some(file.clone()),
                title: Some(format!("importing {}", file.display())),
                action: Asked::Import(announced(file)?),
            }],
            Some(Action::Rm { names }) => {
                let remove = |name: &String| RemoveImage { name: name.clone() };
                let removals = names.iter().map(remove).map(Asked::Remove);
                removals.map(Wish::plain).collect()
            }
            Some(Action::Prune) => vec![Wish::plain(Asked::Prune(PruneImages {}))],
            Some(Action::Pin { name, off }) => {
                let pin = PinImage {
                    name: name.clone(),
                    off: *off,
                };
                vec![Wish::plain(Asked::Pin(pin))]
            }
        })
    }

    fn print(&self, done: &[(&str, ImagesDone)]) -> Result<(), Failure> {
        let lines = |verb: &str| -> String {
            let of = |(node, done): &(&str, ImagesDone)| table::lines(node, verb, done);
            done.iter().map(of).collect()
        };
        let text = match &self.action {
            None | Some(Action::Ls) => {
                let is_wide = self.show.output == "wide";
                let mut rows = table::rows(done, is_wide);
                if !self.show.no_headers {
                    rows.insert(0, table::header(is_wide));
                }
                output::table_text(&rows, &[])
            }
            Some(Action::Pull { .. }) => lines("pulled"),
            Some(Action::Import { .. }) => lines("imported"),
            Some(Action::Rm { .. }) => lines("removed"),
            Some(Action::Pin { off: false, .. }) => lines("pinned"),
            Some(Action::Pin { off: true, .. }) => lines("no longer pinned"),
            Some(Action::Prune) => {
                let sum = |(node, done): &(&str, ImagesDone)| table::pruned(node, done);
                lines("removed") + &done.iter().map(sum).collect::<String>()
            }
        };
        output::print(&text)
    }
}

async fn all_nodes(session: &Session) -> Result<Vec<String>, Failure> {
    let kind = resolve("nodes").ok_or_else(|| Failure::local("this build knows no nodes"))?;
    let request = ListRequest {
        key: Some(session.key(kind, "")),
        ..ListRequest::default()
    };
    let (nodes, _) = session.list(request).await?;
    let name = |node: &Value| Some(node.pointer("/metadata/name")?.as_str()?.to_owned());
    let names: Vec<String> = nodes.iter().filter_map(name).collect();
    match names.is_empty() {
        true => Err(Failure::local("there are no nodes")),
        false => Ok(names),
    }
}

async fn secret_json(session: &Session, name: &str) -> Result<Vec<u8>, Failure> {
    let kind = resolve("secrets").ok_or_else(|| Failure::local("this build knows no secrets"))?;
    let secret = session.get(session.key(kind, name)).await?;
    Ok(secret.to_string().into_bytes())
}

fn announced(file: &Path) -> Result<ImportImages, Failure> {
    let shown = file.display();
    let metadata =
        std::fs::metadata(file).map_err(|e| Failure::Local(format!("cannot read {shown}: {e}")))?;
    if !metadata.is_file() {
        let text =
            format!("{shown} is no file: pack a directory with `tar -cf image.tar -C DIR .`");
        return Err(Failure::Local(text));
    }
    let name = file.file_name().unwrap_or_default();
    Ok(ImportImages {
        file_name: name.to_string_lossy().into_owned(),
        size_bytes: metadata.len(),
    })
}

async fn ask_all(
    session: &Session,
    nodes: &[String],
    wish: &Wish,
) -> Vec<Result<ImagesDone, Failure>> {
    let bars = MultiProgress::new();
    let asked = nodes.iter().map(|node| {
        let bar = wish.title.as_ref().map(|title| {
            let bar = bars.add(ProgressBar::new(0).with_style(style()));
            bar.with_message(format!("{node}: {title}"))
        });
        async move {
            let answer = ask(session, node, wish, bar.as_ref()).await;
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
            answer
        }
    });
    join_all(asked).await
}

fn style() -> ProgressStyle {
    let template = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {wide_msg}";
    // A template that does not parse is a bar without figures, and a failed test.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

async fn ask(
    session: &Session,
    node: &str,
    wish: &Wish,
    bar: Option<&ProgressBar>,
) -> Result<ImagesDone, Failure> {
    let (input, queue) = mpsc::channel(QUEUE);
    let request = ImagesRequest {
        node: node.to_owned(),
        action: Some(wish.action.clone()),
    };
    let first = images_input::Input::Request(request);
    let left = || Failure::local("the connection to the server closed");
    let sent = input.send(ImagesInput { input: Some(first) }).await;
    sent.map_err(|_| left())?;
    let mut images = session.images.clone();
    let mut answers = images.ask(ReceiverStream::new(queue)).await?.into_inner();
    let upload = async {
        match &wish.archive {
            Some(path) => send_archive(path, &input, bar).await,
            None => Ok(()),
        }
    };
    let answer = async {
        while let Some(answer) = answers.message().await? {
            match answer.answer {
                Some(Answer::Progress(progress)) => {
                    if let Some(bar) = bar {
                        bar.set_length(progress.total_bytes);
                        bar.set_position(progress.done_bytes);
                    }
                }
                Some(Answer::Done(done)) => return Ok(done),
                Some(Answer::Error(words)) => return Err(Failure::Local(words)),
                None => {}
            }
        }
        Err(left())
    };
    tokio::pin!(answer);
    // Cancel-safe: an answer before all is sent is a refusal, and the rest is of no use.
    let sent = tokio::select! {
        done = &mut answer => return done,
        sent = upload => sent,
    };
    sent?;
    answer.await
}

async fn send_archive(
    path: &Path,
    input: &mpsc::Sender<ImagesInput>,
    bar: Option<&ProgressBar>,
) -> Result<(), Failure> {
    let failed = |e| Failure::Local(format!("cannot read {}: {e}", path.display()));
    let mut file = tokio::fs::File::open(path).await.map_err(failed)?;
    if let Some(bar) = bar {
        bar.set_length(file.metadata().await.map_err(failed)?.len());
    }
    loop {
        let mut data = vec![0; CHUNK_BYTES];
        let count = file.read(&mut data).await.map_err(failed)?;
        if count == 0 {
            return Ok(());
        }
        data.truncate(count);
        let archive = images_input::Input::Archive(data.into());
        let message = ImagesInput {
            input: Some(archive),
        };
        if input.send(message).await.is_err() {
            // The answer says why.
            return Ok(());
        }
        if let Some(bar) = bar {
            bar.inc(count as u64);
        }
    }
}

/// `3.20 MiB`
fn size(bytes: u64) -> String {
    HumanBytes(bytes).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bar_s_template_is_one() {
        let template = "{bar:30} {bytes}/{total_bytes} {bytes_per_sec} {wide_msg}";
        assert!(ProgressStyle::with_template(template).is_ok());
    }

    #[test]
    fn only_a_file_is_announced() {
        let directory = tempfile::tempdir().unwrap();
        let refused = announced(directory.path()).unwrap_err().to_string();
        assert!(refused.contains("is no file: pack"), "{refused}");
        let file = directory.path().join("web.tar");
        assert!(announced(&file).is_err());
        std::fs::write(&file, "12345").unwrap();
        let import = announced(&file).unwrap();
        assert_eq!(
            (import.file_name.as_str(), import.size_bytes),
            ("web.tar", 5)
        );
    }
}
