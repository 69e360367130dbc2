mod mirrors;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::json;
use sha2::{Digest as _, Sha256};

use super::document::architecture;
use super::inventory::{InventoryError, Wanted};
use super::*;
use crate::ids::PodUid;

fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("skipped: images need root (owners, mounts)");
    }
    root
}

fn digest(bytes: &[u8]) -> String {
    Digest::from_hash(&Sha256::digest(bytes)).to_string()
}

fn tarball(files: &[(&str, &str)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, text) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        builder
            .append_data(&mut header, name, text.as_bytes())
            .unwrap();
    }
    builder.into_inner().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// An image made by hand: blobs by digest, and what points to them.
struct Handmade {
    blobs: Vec<Vec<u8>>,
    config: Vec<u8>,
    manifest: Vec<u8>,
    layers: Vec<Vec<u8>>,
}

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

impl Handmade {
    /// Two layers: gzip, then zstd with a whiteout.
    fn new() -> Self {
        let bottom = tarball(&[("etc/motd", "hello"), ("etc/gone", "x"), ("bin/sh", "#!")]);
        let top = tarball(&[("etc/.wh.gone", ""), ("etc/motd", "changed")]);
        let zstd = zstd::encode_all(&top[..], 3).unwrap();
        Self::of(&[(bottom.clone(), gzip(&bottom)), (top, zstd)])
    }

    fn of(layers: &[(Vec<u8>, Vec<u8>)]) -> Self {
        let diff_ids: Vec<String> = layers.iter().map(|(plain, _)| digest(plain)).collect();
        let config = json!({"architecture": architecture(), "os": "linux",
            "config": {"Entrypoint": ["/bin/sh"], "Env": ["A=b"]},
            "rootfs": {"type": "layers", "diff_ids": diff_ids}})
        .to_string()
        .into_bytes();
        let packed: Vec<Vec<u8>> = layers.iter().map(|(_, packed)| packed.clone()).collect();
        let manifest = json!({"schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest(&config), "size": config.len()},
            "layers": packed.iter().map(|l| json!({"mediaType": GZIP, "digest": digest(l),
                "size": l.len()})).collect::<Vec<_>>()})
        .to_string()
        .into_bytes();
        let mut blobs = packed.clone();
        blobs.extend([config.clone(), manifest.clone()]);
        Self {
            blobs,
            config,
            manifest,
            layers: packed,
        }
    }

    fn files(&self, name: &str) -> Vec<(String, Vec<u8>)> {
        let index = json!({"schemaVersion": 2, "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": digest(&self.manifest), "size": self.manifest.len(),
            "annotations": {"org.opencontainers.image.ref.name": name}}]});
        let mut files = vec![
            (
                "oci-layout".to_owned(),
                br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec(),
            ),
            ("index.json".to_owned(), index.to_string().into_bytes()),
        ];
        for blob in &self.blobs {
            files.push((format!("blobs/sha256/{}", &digest(blob)[7..]), blob.clone()));
        }
        files
    }

    fn layout(&self, dir: &Path, name: &str) {
        for (path, bytes) in self.files(name) {
            let path = dir.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    }

    fn archive(&self, name: &str) -> Vec<u8> {
        pack(&self.files(name))
    }

    fn docker_save(&self, name: &str) -> Vec<u8> {
        let hex = &digest(&self.config)[7..];
        let mut files: Vec<(String, Vec<u8>)> = Vec::new();
        let mut layers = Vec::new();
        for (i, layer) in self.layers.iter().enumerate() {
            files.push((format!("{i}/layer.tar"), layer.clone()));
            layers.push(format!("{i}/layer.tar"));
        }
        files.push((format!("{hex}.json"), self.config.clone()));
        let manifest =
            json!([{"Config": format!("{hex}.json"), "RepoTags": [name], "Layers": layers}]);
        files.push((
            "manifest.json".to_owned(),
            manifest.to_string().into_bytes(),
        ));
        pack(&files)
    }
}

fn pack(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (name, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, &bytes[..]).unwrap();
    }
    builder.into_inner().unwrap()
}

async fn import_file(store: &ImageStore, path: &Path) -> Result<Vec<Imported>, ImageError> {
    store.import(path, |_| {}).await
}

/// Nothing is there: no image, no layer, nothing half-done.
fn assert_empty(lib: &Path) {
    for dir in ["layers", "ingest", "blobs/sha256"] {
        let left: Vec<_> = fs::read_dir(lib.join("images").join(dir))
            .unwrap()
            .flatten()
            .collect();
        assert!(left.is_empty(), "{dir}: {left:?}");
    }
    let table = Content::open(lib.join("images")).unwrap().table().unwrap();
    assert!(table.images.is_empty() && table.references.is_empty());
}

#[tokio::test]
async fn layout_and_archives_give_the_same_image() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = Handmade::new();
    let layout = dir.path().join("layout");
    image.layout(&layout, "docker.io/library/hand:1");
    let archive = dir.path().join("hand.tar");
    fs::write(&archive, image.archive("hand:1")).unwrap();
    let packed = dir.path().join("hand2.tar.gz");
    fs::write(&packed, gzip(&image.archive("1"))).unwrap();
    let saved = dir.path().join("saved.tar");
    fs::write(&saved, image.docker_save("hand:1")).unwrap();
    for path in [&layout, &archive, &packed, &saved] {
        let lib = tempfile::tempdir().unwrap();
        let store = ImageStore::open(lib.path()).unwrap();
        let (done, total) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let seen = (Arc::clone(&done), Arc::clone(&total));
        let watch = move |p: Progress| {
            seen.0.store(p.done_bytes, Ordering::Relaxed);
            seen.1.store(p.total_bytes, Ordering::Relaxed);
        };
        let imported = store.import(path, watch).await.unwrap();
        assert_eq!(imported[0].id.as_str(), digest(&image.config));
        assert_eq!(done.load(Ordering::Relaxed), total.load(Ordering::Relaxed));
        assert!(done.load(Ordering::Relaxed) > 0);
        let name = if path == &packed { "hand2:1" } else { "hand:1" };
        for written in [name, &format!("docker.io/library/{name}")] {
            let found = store.ensure(written, PullPolicy::Never, &[]).await.unwrap();
            let entrypoint = found.config.config().as_ref().unwrap().entrypoint().clone();
            assert_eq!(entrypoint, Some(vec!["/bin/sh".to_owned()]));
            assert_eq!(found.layers.len(), 2);
        }
        // Again: nothing new, no error.
        assert_eq!(import_file(&store, path).await.unwrap(), imported);
        assert_eq!(store.list(&Wanted::new()).await.unwrap().len(), 1);
    }
}

#[tokio::test]
async fn rootfs_is_writable_shared_and_shows_no_deleted_file() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(dir.path()).unwrap();
    if let Err(error) = store.probe().await {
        eprintln!("skipped: {error}");
        return;
    }
    let file = dir.path().join("hand.tar");
    fs::write(&file, Handmade::new().archive("hand:1")).unwrap();
    import_file(&store, &file).await.unwrap();
    let image = store
        .ensure("hand:1", PullPolicy::IfNotPresent, &[])
        .await
        .unwrap();
    let one = dir.path().join("pods/u/containers/c/0");
    let two = dir.path().join("pods/u/containers/c/1");
    let (a, b) = (
        store
            .mount_rootfs(&image, &one, None, MountPoints::None)
            .await
            .unwrap(),
        store
            .mount_rootfs(&image, &two, None, MountPoints::None)
            .await
            .unwrap(),
    );
    assert_eq!(
        store
            .mount_rootfs(&image, &one, None, MountPoints::None)
            .await
            .unwrap(),
        a
    );
    assert_eq!(fs::read_to_string(a.join("etc/motd")).unwrap(), "changed");
    assert!(!a.join("etc/gone").exists());
    fs::write(a.join("etc/motd"), "mine").unwrap();
    assert_eq!(fs::read_to_string(b.join("etc/motd")).unwrap(), "changed");
    let id = image.id.clone();
    drop(image);
    // However it is called, it is mounted: it stays, with the names it has.
    let nobody = Wanted::new();
    for written in ["hand:1", id.as_str(), &id.hex()[..12]] {
        match store.remove(written, &nobody).await.unwrap_err() {
            InventoryError::InUse { users, .. } => {
                assert_eq!(users, BTreeSet::from([PodUid::new("u").unwrap()]));
            }
            other => panic!("{other}"),
        }
    }
    let listed = store.list(&nobody).await.unwrap();
    assert_eq!((listed[0].names.len(), listed[0].users.len()), (2, 1));
    store.set_pinned("hand:1", false).await.unwrap();
    assert_eq!(store.remove_unused(&BTreeSet::new()).await.unwrap(), vec![]);
    for dir in [&one, &two] {
        store.unmount_rootfs(dir).await.unwrap();
        store.unmount_rootfs(dir).await.unwrap();
    }
    // A volatile layer that lost its mount starts afresh.
    let image = store
        .ensure("hand:1", PullPolicy::Never, &[])
        .await
        .unwrap();
    let again = store
        .mount_rootfs(&image, &one, None, MountPoints::None)
        .await
        .unwrap();
    assert_eq!(
        fs::read_to_string(again.join("etc/motd")).unwrap(),
        "changed"
    );
    drop(image);
    for dir in [&one, &two] {
        remove_rootfs(dir).await.unwrap();
        remove_rootfs(dir).await.unwrap();
        assert!(!dir.exists());
    }
    // A pod wants it by name; then nobody does.
    let pod = BTreeSet::from([PodUid::new("p").unwrap()]);
    let wanted = Wanted::from([("hand:1".to_owned(), pod)]);
    assert!(store.remove("hand:1", &wanted).await.is_err());
    let removed = store.remove("hand:1", &nobody).await.unwrap();
    assert_eq!((removed.names.len(), removed.image.unwrap().id), (2, id));
    let again = store.remove("hand:1", &nobody).await.unwrap_err();
    assert_eq!(again.to_string(), "no image is called \"hand:1\" here");
    fs::remove_file(file).unwrap();
    assert_empty(dir.path());
}

#[test]
fn mount_points_are_below_the_image_and_cost_the_container_nothing() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("image");
    fs::create_dir_all(image.join("etc")).unwrap();
    fs::create_dir_all(image.join("var")).unwrap();
    fs::write(image.join("etc/hostname"), "the image's").unwrap();
    let mut mode = fs::metadata(&image).unwrap().permissions();
    mode.set_mode(0o700);
    fs::set_permissions(image.join("etc"), mode).unwrap();
    let places = dir.path().join("mount-points");
    let mount = |run: &Path, below: MountPoints| {
        let mut lower = below.layers(&places).unwrap();
        lower.push(image.clone());
        overlay::mount_rootfs(&lower, "x", run, None)
    };
    let run = dir.path().join("run");
    let rootfs = match mount(&run, MountPoints::ContainerWithToken) {
        Ok(rootfs) => rootfs,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    let token = rootfs.join(mount_points::TOKEN.trim_start_matches('/'));
    assert!(token.is_dir() && rootfs.join("proc").is_dir());
    assert_eq!(fs::read(rootfs.join("etc/hosts")).unwrap(), b"");
    // What the image says wins.
    let hostname = fs::read_to_string(rootfs.join("etc/hostname")).unwrap();
    assert_eq!(hostname, "the image's");
    let etc = fs::metadata(rootfs.join("etc")).unwrap().permissions();
    assert_eq!(etc.mode() & 0o777, 0o700);
    assert_eq!(fs::read_dir(run.join("upper")).unwrap().count(), 0);
    // The layer is everybody's: what one writes, no other sees.
    fs::write(rootfs.join("etc/hosts"), "mine").unwrap();
    overlay::unmount_rootfs(&run).unwrap();
    // Where the image has a link, the link is followed as ever.
    std::os::unix::fs::symlink("../run", image.join("var/run")).unwrap();
    let run = dir.path().join("second");
    let rootfs = mount(&run, MountPoints::ContainerWithToken).unwrap();
    assert_eq!(fs::read(rootfs.join("etc/hosts")).unwrap(), b"");
    let link = fs::read_link(rootfs.join("var/run")).unwrap();
    assert_eq!(link, Path::new("../run"));
    overlay::unmount_rootfs(&run).unwrap();
    // No token, no directory for it; an image volume shows the image alone.
    fs::remove_file(image.join("var/run")).unwrap();
    for (name, below, count) in [
        ("third", MountPoints::Container, 5),
        ("fourth", MountPoints::None, 2),
    ] {
        let run = dir.path().join(name);
        let rootfs = mount(&run, below).unwrap();
        assert!(!rootfs.join("var/run").exists());
        assert_eq!(fs::read_dir(&rootfs).unwrap().count(), count, "{name}");
        overlay::unmount_rootfs(&run).unwrap();
    }
}

#[tokio::test]
async fn many_layers_mount_both_ways() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let lower: Vec<PathBuf> = (0..127)
        .map(|i| {
            let layer = dir
                .path()
                .join(format!("sha256-{}/fs", format!("{i:x}").repeat(32)));
            fs::create_dir_all(&layer).unwrap();
            fs::write(layer.join(format!("f{i}")), "").unwrap();
            fs::write(layer.join("top"), i.to_string()).unwrap();
            layer
        })
        .collect();
    let run = dir.path().join("run");
    let rootfs = match overlay::mount_rootfs(&lower, "x", &run, None) {
        Ok(rootfs) => rootfs,
        Err(error) => return eprintln!("skipped: {error}"),
    };
    assert_eq!(fs::read_dir(&rootfs).unwrap().count(), 128);
    assert_eq!(fs::read_to_string(rootfs.join("top")).unwrap(), "126");
    overlay::unmount_rootfs(&run).unwrap();
    let run = dir.path().join("other");
    let rootfs = overlay::tests_mount_by_string(&lower, &run);
    assert_eq!(fs::read_dir(&rootfs).unwrap().count(), 128);
    overlay::unmount_rootfs(&run).unwrap();
}

#[tokio::test]
async fn truncated_archives_leave_nothing() {
    if !root() {
        return;
    }
    let lib = tempfile::tempdir().unwrap();
    let store = ImageStore::open(lib.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let whole = Handmade::new().archive("hand:1");
    // Less than the two closing blocks is missing nothing.
    let needed = whole.len() - 1024;
    for length in (0..needed).step_by(512) {
        let path = dir.path().join("cut.tar");
        fs::write(&path, &whole[..length]).unwrap();
        let error = import_file(&store, &path).await.unwrap_err().to_string();
        assert!(error.contains("cut.tar"), "{length}: {error}");
        assert_empty(lib.path());
    }
}

#[tokio::test]
async fn damaged_layers_are_refused_by_digest_and_path() {
    if !root() {
        return;
    }
    let lib = tempfile::tempdir().unwrap();
    let store = ImageStore::open(lib.path()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let image = Handmade::new();
    let layer = digest(&image.layers[0]);
    let blob = |dir: &Path| dir.join("blobs/sha256").join(&layer[7..]);
    let step = (image.layers[0].len() / 24).max(1);
    for at in (0..image.layers[0].len()).step_by(step) {
        let layout = dir.path().join(format!("flip{at}"));
        image.layout(&layout, "hand:1");
        let mut bytes = image.layers[0].clone();
        bytes[at] ^= 0x10;
        fs::write(blob(&layout), &bytes).unwrap();
        let error = import_file(&store, &layout).await.unwrap_err().to_string();
        assert!(
            error.contains(&layer) && error.contains(&format!("flip{at}")),
            "{error}"
        );
        assert_empty(lib.path());
        bytes.truncate(at);
        fs::write(blob(&layout), &bytes).unwrap();
        let error = import_file(&store, &layout).await.unwrap_err().to_string();
        assert!(
            error.contains(&layer) && error.contains("bytes, want"),
            "{error}"
        );
        assert_empty(lib.path());
    }
    // The right bytes of a wrong promise: the diff ID does not match.
    let (plain, other) = (tarball(&[("a", "b")]), tarball(&[("a", "c")]));
    let liar = Handmade::of(&[(plain, gzip(&other))]);
    let layout = dir.path().join("liar");
    liar.layout(&layout, "hand:1");
    let error = import_file(&store, &layout).await.unwrap_err().to_string();
    assert!(error.contains("decompresses to"), "{error}");
    // A bomb: 1 GiB of zeros from a few kilobytes.
    let mut builder = tar::Builder::new(zstd::Encoder::new(Vec::new(), 1).unwrap());
    let mut header = tar::Header::new_gnu();
    header.set_size(1 << 30);
    header.set_mode(0o644);
    builder
        .append_data(
            &mut header,
            "zeros",
            std::io::Read::take(std::io::repeat(0), 1 << 30),
        )
        .unwrap();
    let bomb = builder.into_inner().unwrap().finish().unwrap();
    let bomb = Handmade::of(&[(Vec::new(), bomb)]);
    let layout = dir.path().join("bomb");
    bomb.layout(&layout, "hand:1");
    let error = import_file(&store, &layout).await.unwrap_err().to_string();
    assert!(error.contains("exceed"), "{error}");
    assert_empty(lib.path());
}

#[tokio::test]
async fn reasons_and_messages_are_those_of_kubernetes() {
    if !root() {
        return;
    }
    let lib = tempfile::tempdir().unwrap();
    let store = ImageStore::open(lib.path()).unwrap();
    let never = store
        .ensure("nginx", PullPolicy::Never, &[])
        .await
        .unwrap_err();
    assert_eq!(never.reason(), "ErrImageNeverPull");
    assert!(never.to_string().contains("\"nginx\""));
    let bad = store
        .ensure("Nginx", PullPolicy::Always, &[])
        .await
        .unwrap_err();
    assert_eq!(bad.reason(), "InvalidImageName");
    // Port 1 of loopback: nobody listens.
    let gone = store
        .ensure("127.0.0.1:1/x:1", PullPolicy::IfNotPresent, &[])
        .await
        .unwrap_err();
    assert_eq!(gone.reason(), "ErrImagePull");
    assert!(gone.to_string().contains("127.0.0.1:1/x:1"), "{gone}");
    assert_eq!(PullPolicy::of(None, "nginx"), PullPolicy::Always);
    assert_eq!(PullPolicy::of(None, "nginx:1"), PullPolicy::IfNotPresent);
    assert_eq!(PullPolicy::of(Some("Never"), "nginx"), PullPolicy::Never);
    // An image whose record lost its configuration.
    let file = lib.path().join("hand.tar");
    fs::write(&file, Handmade::new().archive("hand:1")).unwrap();
    let id = import_file(&store, &file).await.unwrap()[0].id.clone();
    fs::write(store.content().blob_path(&id), "{}").unwrap();
    let broken = store
        .ensure("hand:1", PullPolicy::Never, &[])
        .await
        .unwrap_err();
    assert_eq!(broken.reason(), "ImageInspectError");
    assert!(broken.to_string().contains(id.as_str()), "{broken}");
}

// --- a real registry --------------------------------------------------------------------------

struct Registry {
    child: Child,
    address: String,
    _dir: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// bcrypt of `open-sesame`.
const HTPASSWD: &str = "puller:$2y$05$abcdefghijklmnopqrstuutXu9KzOt.1yBoZUeFWoT/914/JfszCO\n";

impl Registry {
    /// Debian's docker-registry with `image` in its storage, on a free loopback port.
    fn start(image: &Handmade, password: bool) -> Option<Self> {
        let binary = "/usr/bin/docker-registry";
        if !Path::new(binary).exists() {
            eprintln!("skipped: {binary} is missing; run: apt-get install docker-registry");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        fill(dir.path(), image);
        let address = format!("127.0.0.1:{port}");
        let mut config = json!({"version": 0.1, "log": {"level": "error"},
            "storage": {"filesystem": {"rootdirectory": dir.path().join("data")}},
            "http": {"addr": address}});
        if password {
            fs::write(dir.path().join("htpasswd"), HTPASSWD).unwrap();
            config["auth"] =
                json!({"htpasswd": {"realm": "test", "path": dir.path().join("htpasswd")}});
        }
        let path = dir.path().join("config.yml");
        fs::write(&path, config.to_string()).unwrap(); // JSON is YAML
        let child = Command::new(binary)
            .arg("serve")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let registry = Self {
            child,
            address,
            _dir: dir,
        };
        for _ in 0..200 {
            if std::net::TcpStream::connect(&registry.address).is_ok() {
                return Some(registry);
            }
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
        panic!("docker-registry does not listen on {}", registry.address);
    }

    fn image(&self) -> String {
        format!("{}/team/hand:1", self.address)
    }
}

/// The registry's own storage layout: blobs, and links that say which repository has them.
fn fill(dir: &Path, image: &Handmade) {
    let base = dir.join("data/docker/registry/v2");
    let write = |path: PathBuf, bytes: &[u8]| {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, bytes).unwrap();
    };
    let index = json!({"schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.list.v2+json",
        "manifests": [
            {"mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 2,
             "digest": digest(b"{}"), "platform": {"os": "linux", "architecture": "s390x"}},
            {"mediaType": "application/vnd.oci.image.manifest.v1+json",
             "size": image.manifest.len(), "digest": digest(&image.manifest),
             "platform": {"os": "linux", "architecture": architecture()}}]})
    .to_string()
    .into_bytes();
    let repository = base.join("repositories/team/hand");
    for blob in image.blobs.iter().chain([&index]) {
        let hex = digest(blob)[7..].to_owned();
        write(
            base.join(format!("blobs/sha256/{}/{hex}/data", &hex[..2])),
            blob,
        );
        write(
            repository.join(format!("_layers/sha256/{hex}/link")),
            digest(blob).as_bytes(),
        );
    }
    for manifest in [&image.manifest, &index] {
        let hex = &digest(manifest)[7..];
        let link = repository.join(format!("_manifests/revisions/sha256/{hex}/link"));
        write(link, digest(manifest).as_bytes());
    }
    let tag = |name: &str, target: &[u8]| {
        let link = repository.join(format!("_manifests/tags/{name}/current/link"));
        write(link, digest(target).as_bytes());
    };
    tag("1", &image.manifest);
    tag("multi", &index);
}

fn credentials(registry: &Registry, password: &str) -> Vec<RegistryAuth> {
    vec![RegistryAuth {
        registry: registry.address.clone(),
        credential: Credential::Basic("puller".to_owned(), password.to_owned()),
    }]
}

#[tokio::test]
async fn registry_pull_with_password_pin_and_index() {
    if !root() {
        return;
    }
    let image = Handmade::new();
    let Some(registry) = Registry::start(&image, true) else {
        return;
    };
    let lib = tempfile::tempdir().unwrap();
    let store = ImageStore::open(lib.path()).unwrap();
    let policy = PullPolicy::IfNotPresent;
    for (auth, part) in [
        (vec![], "no imagePullSecrets fit"),
        (
            credentials(&registry, "wrong"),
            "user \"puller\" was refused",
        ),
    ] {
        let error = store
            .ensure(&registry.image(), policy, &auth)
            .await
            .unwrap_err();
        assert_eq!(error.reason(), "ErrImagePull");
        let error = error.to_string();
        assert!(
            error.contains(part) && error.contains("team/hand:1"),
            "{error}"
        );
        assert!(!error.contains("wrong"), "{error}");
        assert_empty(lib.path());
    }
    let auth = credentials(&registry, "open-sesame");
    let (name, other) = (registry.image(), registry.image());
    let (first, second) = tokio::join!(
        store.ensure(&name, policy, &auth),
        store.ensure(&other, policy, &auth)
    );
    let (first, second) = (first.unwrap(), second.unwrap());
    assert!(
        Arc::ptr_eq(&first, &second),
        "two pulls of one name are one"
    );
    assert!(first.image_id().ends_with(&digest(&image.manifest)));
    let pin = format!("{}/team/hand@{}", registry.address, digest(&image.manifest));
    assert_eq!(
        store.ensure(&pin, PullPolicy::Never, &[]).await.unwrap().id,
        first.id
    );
    let multi = format!("{}/team/hand:multi", registry.address);
    assert_eq!(
        store
            .ensure(&multi, PullPolicy::Always, &auth)
            .await
            .unwrap()
            .id,
        first.id
    );
    let wrong = format!("{}/team/hand@{}", registry.address, digest(b"other"));
    let error = store.ensure(&wrong, policy, &auth).await.unwrap_err();
    assert!(error.to_string().contains(&digest(b"other")), "{error}");
    let missing = format!("{}/team/none:1", registry.address);
    let error = store
        .ensure(&missing, policy, &auth)
        .await
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("team/none:1") && error.contains("404") || error.contains("unknown"),
        "{error}"
    );
    drop((first, second));
    let gone = store.remove_unused(&BTreeSet::new()).await.unwrap();
    assert_eq!(gone.len(), 1, "pulled and unused");
    assert_empty(lib.path());
}

#[tokio::test]
async fn registry_layers_are_verified_and_downloads_resumed() {
    if !root() {
        return;
    }
    let image = Handmade::new();
    let Some(registry) = Registry::start(&image, false) else {
        return;
    };
    let lib = tempfile::tempdir().unwrap();
    let store = ImageStore::open(lib.path()).unwrap();
    let layer = digest(&image.layers[0]);
    let part = lib
        .path()
        .join("images/ingest")
        .join(format!("{}.part", &layer[7..]));
    // The first half is there from an earlier try, and right: the rest is asked for.
    fs::write(&part, &image.layers[0][..image.layers[0].len() / 2]).unwrap();
    let policy = PullPolicy::IfNotPresent;
    store.ensure(&registry.image(), policy, &[]).await.unwrap();
    assert!(!part.exists());
    store.remove_unused(&BTreeSet::new()).await.unwrap();
    // It is there and wrong: refused once, forgotten, then right.
    fs::write(&part, vec![0; image.layers[0].len() / 2]).unwrap();
    let error = store
        .ensure(&registry.image(), policy, &[])
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains(&layer), "{error}");
    assert!(!part.exists());
    store.ensure(&registry.image(), policy, &[]).await.unwrap();
    store.remove_unused(&BTreeSet::new()).await.unwrap();
    // The registry's disk is damaged.
    let blob = registry._dir.path().join(format!(
        "data/docker/registry/v2/blobs/sha256/{}/{}/data",
        &layer[7..9],
        &layer[7..]
    ));
    let mut bytes = image.layers[0].clone();
    bytes[20] ^= 1;
    fs::write(&blob, bytes).unwrap();
    let error = store
        .ensure(&registry.image(), policy, &[])
        .await
        .unwrap_err()
        .to_string();
    assert!(error.contains(&layer), "{error}");
    assert!(store.list(&Wanted::new()).await.unwrap().is_empty());
}
