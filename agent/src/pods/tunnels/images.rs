//! What `gantry images` asks of this node, from the image store.
//!
//! ```text
//! request ─► list │ pull │ import ◄─ archive, staged in a file without a name │ rm │ prune │ pin
//!                     └────────┴─► progress, five times a second ─► answers ◄─ the end
//! ```
//! Who uses an image is told by pods' names; what a pod that has not ended names is in use, whether
//! or not it runs just now: with pull policy Never it could not start again.

use std::collections::{BTreeSet, HashSet};
use std::fs::File;
use std::future::Future;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use gantry_api::k8s_openapi::api::core::v1::{Pod, Secret};
use gantry_api::proto;
use gantry_api::proto::images_answer::Answer;
use gantry_api::proto::images_request::Action;
use tokio::io::AsyncWriteExt as _;
use tokio::sync::{mpsc, watch};

use crate::feed::TunnelError;
use crate::ids::PodUid;
use crate::images::auth::{self, RegistryAuth};
use crate::images::inventory::{Entry, InventoryError, Wanted};
use crate::images::{ImageError, ImageStore, Progress, PullPolicy, images_of};
use crate::view::View;

/// Between two looks at how far a pull or an import is.
const PROGRESS_PERIOD: Duration = Duration::from_millis(200);
/// Pods that a refusal names.
const USERS_SHOWN_MAX: usize = 5;

type Answers = mpsc::Sender<Answer>;

/// The store, and the pods that need its images.
pub(super) struct NodeImages {
    store: ImageStore,
    view: OnceLock<watch::Receiver<Arc<View>>>,
}

fn words(error: impl ToString) -> TunnelError {
    TunnelError(error.to_string())
}

impl NodeImages {
    /// Knows no pods until [`NodeImages::follow`].
    pub(super) fn new(store: ImageStore) -> Self {
        Self {
            store,
            view: OnceLock::new(),
        }
    }

    /// Where the pods come from; the first call counts.
    pub(super) fn follow(&self, view: watch::Receiver<Arc<View>>) {
        let _ = self.view.set(view);
    }

    /// Serves one request. Dropping it ends a pull, which keeps what it has verified.
    pub(super) async fn serve(
        &self,
        request: proto::ImagesRequest,
        archive: mpsc::Receiver<Bytes>,
        answers: &Answers,
    ) -> Result<(), TunnelError> {
        let view = match self.view.get() {
            Some(view) => view.borrow().clone(),
            None => Arc::default(),
        };
        let done = match request.action {
            Some(Action::Import(import)) => self.import(&import, archive, answers, &view).await?,
            // The receiver goes: whatever is sent beside such a request holds nobody up.
            Some(action) => {
                drop(archive);
                self.change(action, answers, &view).await?
            }
            None => return Err(words("this agent does not know that request: is it older?")),
        };
        send(answers, Answer::Done(done)).await
    }

    async fn change(
        &self,
        action: Action,
        answers: &Answers,
        view: &View,
    ) -> Result<proto::ImagesDone, TunnelError> {
        let wanted = wanted(view);
        let shown = |images: Vec<Entry>| proto::ImagesDone {
            images: images.iter().map(|image| shown(image, view)).collect(),
            names: Vec::new(),
        };
        let refused = |error: InventoryError| refused(&error, view);
        match action {
            Action::List(_) => Ok(shown(self.store.list(&wanted).await.map_err(words)?)),
            Action::Pull(pull) => self.pull(&pull, answers, view).await,
            Action::Remove(remove) => {
                let removed = self.store.remove(&remove.name, &wanted).await;
                let removed = removed.map_err(refused)?;
                Ok(proto::ImagesDone {
                    names: removed.names,
                    ..shown(removed.image.into_iter().collect())
                })
            }
            Action::Prune(_) => Ok(shown(self.store.prune(&wanted).await.map_err(refused)?)),
            Action::Pin(pin) => {
                let pinned = self.store.set_pinned(&pin.name, !pin.off).await;
                Ok(shown(vec![pinned.map_err(refused)?]))
            }
            // Has its archive, and is served by itself.
            Action::Import(_) => Err(words("an import without an archive")),
        }
    }

    async fn pull(
        &self,
        pull: &proto::PullImage,
        answers: &Answers,
        view: &View,
    ) -> Result<proto::ImagesDone, TunnelError> {
        let credentials = credentials(&pull.secret_json)?;
        let (seen, far) = watch::channel(Progress::default());
        let note = move |progress: Progress| {
            seen.send_replace(progress);
        };
        let pulling =
            self.store
                .ensure_watched(&pull.name, PullPolicy::Always, &credentials, &note);
        let image = told(pulling, far, answers).await?;
        self.entries(&HashSet::from([image.id.to_string()]), view)
            .await
    }

    async fn import(
        &self,
        import: &proto::ImportImages,
        archive: mpsc::Receiver<Bytes>,
        answers: &Answers,
        view: &View,
    ) -> Result<proto::ImagesDone, TunnelError> {
        let file = self.receive(import.size_bytes, archive).await?;
        let (seen, far) = watch::channel(Progress::default());
        let note = move |progress: Progress| {
            seen.send_replace(progress);
        };
        let importing = self.store.import_file(file, &import.file_name, note);
        let imported = told(importing, far, answers).await?;
        let ids = imported.iter().map(|image| image.id.to_string()).collect();
        self.entries(&ids, view).await
    }

    /// Takes the announced number of bytes into a file without a name.
    async fn receive(
        &self,
        size_bytes: u64,
        mut archive: mpsc::Receiver<Bytes>,
    ) -> Result<File, TunnelError> {
        let staged = self.store.staging_file(size_bytes).await.map_err(words)?;
        let mut file = tokio::fs::File::from_std(staged);
        let failed = |error| words(format!("keep the archive that arrives: {error}"));
        let mut left = size_bytes;
        while left > 0 {
            let data = archive.recv().await;
            let data =
                data.ok_or_else(|| words(format!("{left} bytes of the archive are missing")))?;
            left = left
                .checked_sub(data.len() as u64)
                .ok_or_else(|| words("the archive is longer than it was announced"))?;
            file.write_all(&data).await.map_err(failed)?;
        }
        file.flush().await.map_err(failed)?;
        Ok(file.into_std().await)
    }

    async fn entries(
        &self,
        ids: &HashSet<String>,
        view: &View,
    ) -> Result<proto::ImagesDone, TunnelError> {
        let mut images = self.store.list(&wanted(view)).await.map_err(words)?;
        images.retain(|image| ids.contains(image.id.as_str()));
        Ok(proto::ImagesDone {
            images: images.iter().map(|image| shown(image, view)).collect(),
            names: Vec::new(),
        })
    }
}

async fn send(answers: &Answers, answer: Answer) -> Result<(), TunnelError> {
    let sent = answers.send(answer).await;
    sent.map_err(|_| words("the client has left"))
}

/// Does the work and tells how far it is.
async fn told<T>(
    work: impl Future<Output = Result<T, ImageError>>,
    far: watch::Receiver<Progress>,
    answers: &Answers,
) -> Result<T, TunnelError> {
    tokio::pin!(work);
    let mut period = tokio::time::interval(PROGRESS_PERIOD);
    loop {
        tokio::select! {
            // Cancel-safe: the work is polled again where it was.
            done = &mut work => return done.map_err(words),
            // Cancel-safe: a timer.
            _ = period.tick() => {
                let Progress { done_bytes, total_bytes } = *far.borrow();
                let progress = proto::ImagesProgress { done_bytes, total_bytes };
                send(answers, Answer::Progress(progress)).await?;
            }
        }
    }
}

fn credentials(secret_json: &[u8]) -> Result<Vec<RegistryAuth>, TunnelError> {
    if secret_json.is_empty() {
        return Ok(Vec::new());
    }
    // serde_json's words may quote the secret.
    let secret: Secret =
        serde_json::from_slice(secret_json).map_err(|_| words("the pull secret is no Secret"))?;
    auth::from_secret(&secret).map_err(words)
}

/// The images of all pods that have not ended.
fn wanted(view: &View) -> Wanted {
    let mut wanted = Wanted::new();
    for (uid, pod) in view.pods.iter().filter(|(_, pod)| !has_ended(pod)) {
        for name in images_of(pod) {
            wanted.entry(name).or_default().insert(uid.clone());
        }
    }
    wanted
}

fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

fn shown(image: &Entry, view: &View) -> proto::NodeImage {
    proto::NodeImage {
        id: image.id.to_string(),
        names: image.names.clone(),
        size_bytes: image.size_bytes,
        pinned: image.pinned,
        users: titles(&image.users, view),
    }
}

/// `namespace/name`; a pod that has left the API and not yet the node has only its UID.
fn titles(users: &BTreeSet<PodUid>, view: &View) -> Vec<String> {
    let title = |uid: &PodUid| match view.pods.get(uid) {
        Some(pod) => {
            let part = |text: &Option<String>| text.clone().unwrap_or_default();
            let (namespace, name) = (&pod.metadata.namespace, &pod.metadata.name);
            format!("{}/{}", part(namespace), part(name))
        }
        None => format!("pod {uid}, which is ending"),
    };
    let mut titles: Vec<String> = users.iter().map(title).collect();
    titles.sort();
    titles
}

/// What to do about it, too.
fn refused(error: &InventoryError, view: &View) -> TunnelError {
    match error {
        InventoryError::NotHere { .. } => words(format!("{error}: `gantry images` lists what is")),
        InventoryError::InUse { users, .. } if users.is_empty() => words(format!(
            "{error} by a pod that is about to start: try again"
        )),
        InventoryError::InUse { users, .. } => {
            let titles = titles(users, view);
            let more = titles.len().saturating_sub(USERS_SHOWN_MAX);
            let mut text = titles[..titles.len() - more].join(", ");
            if more > 0 {
                text.push_str(&format!(" and {more} more"));
            }
            words(format!("{error} by {text}: delete what uses it first"))
        }
        InventoryError::Busy | InventoryError::Store(_) => words(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn view(pods: &[(&str, &str, &str)]) -> View {
        let pod = |(uid, image, phase): &(&str, &str, &str)| {
            let pod = json!({"metadata": {"name": uid, "namespace": "shop"},
                "spec": {"containers": [{"name": "a", "image": image}],
                    "ephemeralContainers": [{"name": "d", "image": "debug:1"}],
                    "volumes": [{"name": "v", "image": {"reference": "data:1"}}]},
                "status": {"phase": phase}});
            let pod: Pod = serde_json::from_value(pod).unwrap();
            (PodUid::new(uid).unwrap(), Arc::new(pod))
        };
        View {
            pods: Arc::new(pods.iter().map(pod).collect()),
            ..View::default()
        }
    }

    async fn ask(
        images: &NodeImages,
        action: Action,
        data: &[&'static [u8]],
    ) -> (Result<(), TunnelError>, Option<Answer>) {
        let (sender, archive) = mpsc::channel(8);
        for part in data {
            sender.send(Bytes::from_static(part)).await.unwrap();
        }
        drop(sender);
        let (answers, mut heard) = mpsc::channel(64);
        let request = proto::ImagesRequest {
            node: "n".into(),
            action: Some(action),
        };
        let served = images.serve(request, archive, &answers).await;
        drop(answers);
        let mut last = None;
        while let Some(answer) = heard.recv().await {
            last = Some(answer);
        }
        (served, last)
    }

    #[test]
    fn pods_that_have_not_ended_want_images_of_containers_and_volumes() {
        let view = view(&[("web", "nginx", "Running"), ("done", "job:1", "Succeeded")]);
        let names: Vec<String> = wanted(&view).into_keys().collect();
        assert_eq!(names, ["data:1", "debug:1", "nginx"]);
    }

    #[test]
    fn a_refusal_says_who_and_what_to_do() {
        let view = view(&[("a", "x", ""), ("b", "x", "")]);
        let users: Vec<PodUid> = ["a", "b", "gone"].map(|u| PodUid::new(u).unwrap()).into();
        let in_use = |users: &[PodUid]| InventoryError::InUse {
            written: "x".into(),
            users: users.iter().cloned().collect(),
        };
        assert_eq!(
            refused(&in_use(&users), &view).0,
            "image \"x\" is in use by pod gone, which is ending, shop/a, shop/b: delete what uses it \
             first"
        );
        let many: Vec<PodUid> = (0..9)
            .map(|n| PodUid::new(&format!("u{n}")).unwrap())
            .collect();
        assert!(refused(&in_use(&many), &view).0.contains(" and 4 more:"));
        assert!(refused(&in_use(&[]), &view).0.contains("about to start"));
    }

    #[tokio::test]
    async fn a_bad_archive_is_refused_in_words_and_leaves_nothing() {
        let lib = tempfile::tempdir().unwrap();
        let images = NodeImages::new(ImageStore::open(lib.path()).unwrap());
        let import = |size_bytes| {
            Action::Import(proto::ImportImages {
                file_name: "web.tar".into(),
                size_bytes,
            })
        };
        for (size, data, text) in [
            (
                9,
                &[b"short".as_slice()][..],
                "4 bytes of the archive are missing",
            ),
            (
                4,
                &[b"longer".as_slice()][..],
                "longer than it was announced",
            ),
            (6, &[b"no".as_slice(), b"tar!"][..], "web.tar: "),
            (1 << 60, &[][..], "bytes are to come"),
        ] {
            let (served, _) = ask(&images, import(size), data).await;
            let error = served.unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
        let left = std::fs::read_dir(lib.path().join("images/ingest")).unwrap();
        assert_eq!(left.count(), 0);
        let (served, last) = ask(&images, Action::List(proto::ListImages {}), &[]).await;
        served.unwrap();
        assert_eq!(last, Some(Answer::Done(proto::ImagesDone::default())));
    }

    #[tokio::test]
    async fn a_bad_name_or_secret_is_refused_in_words() {
        let lib = tempfile::tempdir().unwrap();
        let images = NodeImages::new(ImageStore::open(lib.path()).unwrap());
        let pull = |name: &str, secret: &str| {
            Action::Pull(proto::PullImage {
                name: name.into(),
                secret_json: secret.to_owned().into(),
            })
        };
        let name = "Not/A:Name:";
        let remove = Action::Remove(proto::RemoveImage {
            name: "web:1".into(),
        });
        for (action, text) in [
            (pull(name, ""), name),
            (pull("web", "{\"data\": 7}"), "the pull secret is no Secret"),
            (
                remove,
                "no image is called \"web:1\" here: `gantry images` lists what is",
            ),
        ] {
            let (served, _) = ask(&images, action, &[]).await;
            let error = served.unwrap_err().to_string();
            assert!(error.contains(text), "{error}");
        }
    }
}
