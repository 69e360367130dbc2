//! Pulling from a registry: manifest, configuration, layers, each verified before it counts.
//!
//! ```text
//! mirrors, then the registry ─► credentials (most specific first) ─► manifest ─► (index ─► this platform's manifest) ─► config ─► layers, 4 at a time
//!                                                                                               └─► *.part ─► verified ─► unpacked
//! ```
//! A download that breaks off leaves its part; the next pull asks for the rest (HTTP ranges). One
//! client per attempt: oci-client keeps credentials per registry, and they must not be shared
//! between pods. Plain HTTP only to loopback addresses.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use oci_client::client::{BlobResponse, Client, ClientConfig, ClientProtocol};
use oci_client::errors::OciDistributionError;
use oci_client::secrets::RegistryAuth as ClientAuth;
use sha2::{Digest as _, Sha256};

use super::auth::{Credential, RegistryAuth, matching};
use super::content::{LayerWant, Record};
use super::document::{ACCEPTED, DOCUMENT_BYTES_MAX, Descriptor, Document, choose, parse_config};
use super::error::ImageError;
use super::reference::{Digest, Reference};
use super::registries::Endpoint;
use super::{DOWNLOADS_MAX, Image, ImageStore, Progress};

/// A registry that does not answer the connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// A registry that stops sending.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Indexes may point to indexes.
const INDEX_DEPTH_MAX: usize = 3;

/// Told of the bytes done and in all.
pub(super) type Watch<'a> = &'a (dyn Fn(Progress) + Send + Sync);

/// Gets `name` from the first of its mirrors that has it, else from its registry.
pub(super) async fn pull(
    store: &ImageStore,
    name: &Reference,
    auths: &[RegistryAuth],
    watch: Watch<'_>,
) -> Result<Arc<Image>, ImageError> {
    let mut failures = Vec::new();
    for endpoint in store.shared.registries.endpoints(name) {
        match Box::pin(pull_from(store, name, &endpoint, auths, watch)).await {
            Ok(image) => return Ok(image),
            Err(error) => failures.push((endpoint.host, error)),
        }
    }
    Err(ImageError::of_all(failures))
}

/// With the credentials that fit the host, one after the other.
async fn pull_from(
    store: &ImageStore,
    name: &Reference,
    endpoint: &Endpoint,
    auths: &[RegistryAuth],
    watch: Watch<'_>,
) -> Result<Arc<Image>, ImageError> {
    let asked = Reference {
        registry: endpoint.host.clone(),
        ..name.clone()
    };
    let mut attempts: Vec<ClientAuth> = matching(auths, &asked)
        .into_iter()
        .map(|a| match &a.credential {
            Credential::Basic(user, password) => ClientAuth::Basic(user.clone(), password.clone()),
            Credential::Bearer(token) => ClientAuth::Bearer(token.clone()),
        })
        .collect();
    if attempts.is_empty() {
        attempts.push(ClientAuth::Anonymous);
    }
    let mut denied = None;
    for auth in attempts {
        let session = Session::new(store, name, endpoint, auth, watch)?;
        match session.manifest().await {
            Err(Failure::Denied(text)) => denied = Some(text),
            Err(Failure::Other(error)) => return Err(error),
            Ok((digest, bytes, config, layers)) => {
                return session.fetch(digest, bytes, config, layers).await;
            }
        }
    }
    Err(ImageError::Registry(denied.unwrap_or_default()))
}

enum Failure {
    /// Another credential may help.
    Denied(String),
    Other(ImageError),
}

impl From<ImageError> for Failure {
    fn from(error: ImageError) -> Self {
        Self::Other(error)
    }
}

struct Session<'a> {
    store: &'a ImageStore,
    name: &'a Reference,
    endpoint: &'a Endpoint,
    client: Client,
    auth: ClientAuth,
    watch: Watch<'a>,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

type Manifest = (Digest, Vec<u8>, Descriptor, Vec<Descriptor>);

impl<'a> Session<'a> {
    fn new(
        store: &'a ImageStore,
        name: &'a Reference,
        endpoint: &'a Endpoint,
        auth: ClientAuth,
        watch: Watch<'a>,
    ) -> Result<Self, ImageError> {
        let plain = endpoint.plain_http.then(|| endpoint.host.clone());
        // Not Client::new: where this fails (no CA certificates), that one panics.
        let client = Client::try_from(ClientConfig {
            protocol: ClientProtocol::HttpsExcept(plain.into_iter().collect()),
            connect_timeout: Some(CONNECT_TIMEOUT),
            read_timeout: Some(READ_TIMEOUT),
            user_agent: concat!("gantry/", env!("CARGO_PKG_VERSION")),
            ..ClientConfig::default()
        })
        .map_err(|e| {
            let reason = chain(&e);
            ImageError::Registry(format!(
                "no HTTPS client ({reason}): install ca-certificates"
            ))
        })?;
        Ok(Self {
            store,
            name,
            endpoint,
            client,
            auth,
            watch,
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
        })
    }

    fn done(&self, bytes: u64) {
        let done = self.done_bytes.fetch_add(bytes, Ordering::Relaxed) + bytes;
        (self.watch)(Progress {
            done_bytes: done,
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
        });
    }

    fn corrupt(&self, what: impl Into<String>, reason: impl ToString) -> ImageError {
        ImageError::Corrupt {
            origin: self.name.name(),
            what: what.into(),
            reason: reason.to_string(),
        }
    }

    /// The manifest for this machine, its digest checked against the pin or the index entry.
    async fn manifest(&self) -> Result<Manifest, Failure> {
        let mut pin = self.name.digest.clone();
        for _ in 0..=INDEX_DEPTH_MAX {
            let (digest, bytes) = self.manifest_bytes(pin.as_ref()).await?;
            let what = || format!("manifest {digest}");
            match Document::parse(&bytes).map_err(|r| self.corrupt(what(), r))? {
                Document::Manifest { config, layers } => {
                    return Ok((digest, bytes, config, layers));
                }
                Document::Index(entries) => {
                    let entry = choose(&entries).map_err(|r| self.corrupt(what(), r))?;
                    pin = Some(entry.digest.clone());
                }
            }
        }
        Err(self.corrupt("manifest", "indexes nested too deep").into())
    }

    async fn manifest_bytes(&self, pin: Option<&Digest>) -> Result<(Digest, Vec<u8>), Failure> {
        let target = self.target(pin);
        let (bytes, _) = self
            .client
            .pull_manifest_raw(&target, &self.auth, &ACCEPTED)
            .await
            .map_err(|e| self.failure(e))?;
        if bytes.len() as u64 > DOCUMENT_BYTES_MAX {
            let reason = format!("{} bytes, at most {DOCUMENT_BYTES_MAX}", bytes.len());
            return Err(self.corrupt("manifest", reason).into());
        }
        let digest = Digest::from_hash(&Sha256::digest(&bytes));
        if let Some(pin) = pin.filter(|p| **p != digest) {
            let reason = format!("content has digest {digest}");
            return Err(self.corrupt(format!("manifest {pin}"), reason).into());
        }
        Ok((digest, bytes.to_vec()))
    }

    fn target(&self, pin: Option<&Digest>) -> oci_client::Reference {
        let (registry, repository) = (self.endpoint.host.clone(), self.name.repository.clone());
        match (pin, &self.name.tag) {
            (Some(digest), _) => {
                oci_client::Reference::with_digest(registry, repository, digest.to_string())
            }
            (None, tag) => {
                let tag = tag.clone().unwrap_or_else(|| "latest".to_owned());
                oci_client::Reference::with_tag(registry, repository, tag)
            }
        }
    }

    fn failure(&self, error: OciDistributionError) -> Failure {
        let denied = match &error {
            OciDistributionError::UnauthorizedError { .. }
            | OciDistributionError::AuthenticationFailure(_) => true,
            OciDistributionError::ServerError { code, .. } => matches!(code, 401 | 403),
            OciDistributionError::RegistryError { envelope, .. } => {
                use oci_client::errors::OciErrorCode::{Denied, Unauthorized};
                envelope
                    .errors
                    .iter()
                    .any(|e| matches!(e.code, Denied | Unauthorized))
            }
            _ => false,
        };
        if denied {
            let who = match &self.auth {
                ClientAuth::Anonymous => "no imagePullSecrets fit this registry".to_owned(),
                ClientAuth::Basic(user, _) => format!("user {user:?} was refused"),
                ClientAuth::Bearer(_) => "the token was refused".to_owned(),
            };
            let host = &self.endpoint.host;
            return Failure::Denied(format!("unauthorized at registry {host:?}: {who}"));
        }
        Failure::Other(ImageError::Registry(chain(&error)))
    }

    /// Configuration and layers, then the name.
    async fn fetch(
        &self,
        digest: Digest,
        manifest: Vec<u8>,
        config: Descriptor,
        layers: Vec<Descriptor>,
    ) -> Result<Arc<Image>, ImageError> {
        let addition = self.store.blocking(|s| s.content().lock_addition()).await?;
        let config_bytes = self.config(&config).await?;
        let (_, diff_ids) = parse_config(&config_bytes, layers.len())
            .map_err(|r| self.corrupt(format!("image configuration {}", config.digest), r))?;
        let wants: Vec<LayerWant> = layers
            .iter()
            .zip(&diff_ids)
            .map(|(layer, diff_id)| LayerWant {
                digest: Some(layer.digest.clone()),
                size: layer.size,
                diff_id: diff_id.clone(),
                origin: self.name.name(),
            })
            .collect();
        let total: u64 = layers.iter().map(|l| l.size).sum();
        self.total_bytes.store(total, Ordering::Relaxed);
        futures_util::stream::iter(wants.iter().map(Ok))
            .try_for_each_concurrent(DOWNLOADS_MAX, |want| Box::pin(self.layer(want)))
            .await?;
        let record = Record {
            layers: diff_ids,
            manifest: Some(digest.clone()),
            size_bytes: total,
            pinned: false,
        };
        let names = [self.name.to_string(), self.name.pinned(&digest).to_string()];
        self.store
            .blocking(move |store| {
                let content = store.content();
                content.put_document(&manifest)?;
                let id = content.put_document(&config_bytes)?;
                content.touch(&id);
                content.update(|table| {
                    let pinned = table.images.get(&id).is_some_and(|r| r.pinned);
                    table.images.insert(id.clone(), Record { pinned, ..record });
                    for name in &names {
                        table.references.insert(name.clone(), id.clone());
                    }
                })?;
                // Looked up while additions are locked: no clean-up comes in between.
                let image = store.lookup(&names[0])?;
                drop(addition);
                image.ok_or_else(|| ImageError::Registry("vanished while it was pulled".to_owned()))
            })
            .await
    }

    async fn config(&self, config: &Descriptor) -> Result<Vec<u8>, ImageError> {
        let what = || format!("image configuration {}", config.digest);
        if config.size > DOCUMENT_BYTES_MAX {
            let reason = format!("{} bytes, at most {DOCUMENT_BYTES_MAX}", config.size);
            return Err(self.corrupt(what(), reason));
        }
        let mut stream = self
            .client
            .pull_blob_stream(&self.target(None), config.digest.as_str())
            .await
            .map_err(|e| self.registry(e))?
            .stream;
        let mut bytes = Vec::new();
        while let Some(chunk) = stream.next().await {
            bytes.extend_from_slice(&chunk.map_err(|e| self.corrupt(what(), e))?);
            if bytes.len() as u64 > config.size {
                return Err(self.corrupt(what(), format!("more than {} bytes", config.size)));
            }
        }
        let actual = Digest::from_hash(&Sha256::digest(&bytes));
        if actual != config.digest {
            return Err(self.corrupt(what(), format!("content has digest {actual}")));
        }
        Ok(bytes)
    }

    fn registry(&self, error: OciDistributionError) -> ImageError {
        match self.failure(error) {
            Failure::Denied(text) => ImageError::Registry(text),
            Failure::Other(error) => error,
        }
    }

    /// Downloads and unpacks one layer unless it is here. One task per layer and process.
    async fn layer(&self, want: &LayerWant) -> Result<(), ImageError> {
        let _one = self.store.shared.locks.lock(want.diff_id.as_str()).await;
        if self.store.content().has_layer(&want.diff_id) {
            self.done(want.size);
            return Ok(());
        }
        let file = {
            let closed = |_| ImageError::Registry("the image store is closed".to_owned());
            let _slot = self
                .store
                .shared
                .downloads
                .acquire()
                .await
                .map_err(closed)?;
            self.download(want).await?
        };
        let want = want.clone();
        self.store
            .blocking(move |store| {
                let Part { mut file, path } = file;
                file.seek(SeekFrom::Start(0))
                    .map_err(ImageError::io("read the downloaded layer"))?;
                let result = store.content().unpack(&mut file, &want);
                // Unpacked or refused: either way these bytes are not needed again.
                let _ = std::fs::remove_file(path);
                result
            })
            .await
    }

    /// The layer's bytes in a file, continued from where an earlier attempt stopped.
    async fn download(&self, want: &LayerWant) -> Result<Part, ImageError> {
        let digest = want.digest.clone().unwrap_or_else(|| want.diff_id.clone());
        let size = want.size;
        let part = self
            .store
            .blocking(move |store| Part::open(store, &digest, size))
            .await?;
        let mut part = match part {
            PartState::Complete(part) => return Ok(part),
            PartState::Partial(part) => part,
        };
        let digest = want
            .digest
            .as_ref()
            .map_or(want.diff_id.as_str(), Digest::as_str);
        let mut have = part.len()?;
        self.done(have);
        let target = self.target(None);
        let response = if have == 0 {
            let stream = self.client.pull_blob_stream(&target, digest).await;
            BlobResponse::Full(stream.map_err(|e| self.registry(e))?)
        } else {
            let rest = self
                .client
                .pull_blob_stream_partial(&target, digest, have, None)
                .await;
            rest.map_err(|e| self.registry(e))?
        };
        let mut stream = match response {
            BlobResponse::Full(stream) => {
                part.truncate()?;
                have = 0;
                stream.stream
            }
            BlobResponse::Partial(stream) => stream.stream,
        };
        while let Some(chunk) = stream.next().await {
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => {
                    // A wrong digest is told by the last chunk; a broken connection keeps its part.
                    if have >= want.size {
                        part.discard();
                    }
                    return Err(self.corrupt(format!("layer {digest}"), chain(&error)));
                }
            };
            have += chunk.len() as u64;
            self.done(chunk.len() as u64);
            if have > want.size {
                part.discard();
                let reason = format!("more than {} bytes", want.size);
                return Err(self.corrupt(format!("layer {digest}"), reason));
            }
            part = self.store.blocking(move |_| part.append(&chunk)).await?;
        }
        if have < want.size {
            let reason = format!("{have} bytes, want {}: connection closed early", want.size);
            return Err(self.corrupt(format!("layer {digest}"), reason));
        }
        Ok(part)
    }
}

/// A download in progress, locked against other processes.
struct Part {
    file: File,
    path: PathBuf,
}

enum PartState {
    Complete(Part),
    Partial(Part),
}

impl Part {
    fn open(store: &ImageStore, digest: &Digest, size: u64) -> Result<PartState, ImageError> {
        let path = store
            .content()
            .ingest()
            .join(format!("{}.part", digest.hex()));
        let context = format!("open {}", path.display());
        let open = || -> std::io::Result<File> {
            let file = File::options()
                .create(true)
                .truncate(false)
                .read(true)
                .write(true)
                .open(&path)?;
            file.lock()?;
            Ok(file)
        };
        let mut file = open().map_err(ImageError::io(context.clone()))?;
        let have = file
            .seek(SeekFrom::End(0))
            .map_err(ImageError::io(context))?;
        let mut part = Self { file, path };
        if have < size {
            return Ok(PartState::Partial(part));
        }
        // Whole, if it is what it should be; a wrong one would only fail again.
        if have == size && part.hash()? == *digest {
            return Ok(PartState::Complete(part));
        }
        part.truncate()?;
        Ok(PartState::Partial(part))
    }

    fn hash(&mut self) -> Result<Digest, ImageError> {
        let mut hasher = Sha256::new();
        let mut buffer = vec![0; 64 * 1024];
        let context = format!("read {}", self.path.display());
        let mut read = || -> std::io::Result<()> {
            self.file.seek(SeekFrom::Start(0))?;
            loop {
                match self.file.read(&mut buffer)? {
                    0 => return Ok(()),
                    n => hasher.update(&buffer[..n]),
                }
            }
        };
        read().map_err(ImageError::io(context))?;
        Ok(Digest::from_hash(&hasher.finalize()))
    }

    fn len(&self) -> Result<u64, ImageError> {
        let meta = self.file.metadata();
        Ok(meta
            .map_err(ImageError::io(format!("stat {}", self.path.display())))?
            .len())
    }

    fn truncate(&mut self) -> Result<(), ImageError> {
        self.file
            .set_len(0)
            .and_then(|()| self.file.seek(SeekFrom::Start(0)))
            .map(drop)
            .map_err(ImageError::io(format!("truncate {}", self.path.display())))
    }

    fn append(mut self, bytes: &[u8]) -> Result<Self, ImageError> {
        self.file
            .write_all(bytes)
            .map_err(ImageError::io(format!("write {}", self.path.display())))?;
        Ok(self)
    }

    fn discard(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// An error with its causes, printed once: reqwest says the interesting part last.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}
