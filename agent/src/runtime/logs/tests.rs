//! Logs as the shim writes them, read back.

use super::*;
use futures_util::StreamExt;
use proptest::prelude::*;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;

const T: &str = "2026-11-20T11:22:33.000000001Z";

struct Log {
    directory: tempfile::TempDir,
}

impl Log {
    fn new(text: &str) -> Self {
        let log = Self {
            directory: tempfile::tempdir().unwrap(),
        };
        fs::write(log.path(), text).unwrap();
        fs::create_dir(log.run()).unwrap();
        log
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("0.log")
    }

    fn run(&self) -> PathBuf {
        self.directory.path().join("run")
    }

    fn append(&self, text: &str) {
        let mut file = File::options()
            .append(true)
            .create(true)
            .open(self.path())
            .unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    fn end(&self) {
        fs::write(self.run().join(EXIT_FILE), "code=0\n").unwrap();
    }

    async fn read(&self, options: LogOptions) -> String {
        let mut stream = Box::pin(stream(&self.path(), &self.run(), options));
        let mut all = Vec::new();
        while let Some(part) = stream.next().await {
            all.extend_from_slice(&part.unwrap());
        }
        String::from_utf8(all).unwrap()
    }
}

fn numbered(count: usize) -> String {
    (1..=count).fold(String::new(), |mut text, i| {
        let _ = writeln!(text, "{T} stdout F line {i}");
        text
    })
}

#[tokio::test]
async fn streams_are_merged_and_parts_joined() {
    let log = Log::new(&format!(
        "{T} stdout P one, \n{T} stderr F err\n{T} stdout F two\n{T} stdout F \n{T} stdout P end\n"
    ));
    assert_eq!(
        log.read(LogOptions::default()).await,
        "err\none, two\n\nend"
    );
    let options = LogOptions {
        timestamps: true,
        ..LogOptions::default()
    };
    let want = format!("{T} err\n{T} one, two\n{T} \n{T} end");
    assert_eq!(log.read(options).await, want);
}

#[tokio::test]
async fn tail_takes_the_last_lines_of_logs_of_any_length() {
    for count in [0, 1, 5, 100, 5000] {
        let log = Log::new(&numbered(count));
        for tail in [0usize, 1, 3, 4999, 6000] {
            let options = LogOptions {
                tail_lines: Some(tail as u64),
                ..LogOptions::default()
            };
            let want: String = (count.saturating_sub(tail) + 1..=count)
                .map(|i| format!("line {i}\n"))
                .collect();
            assert_eq!(log.read(options).await, want, "{tail} of {count}");
        }
    }
}

#[tokio::test]
async fn tail_counts_a_line_in_parts_once() {
    let log = Log::new(&format!(
        "{T} stdout F a\n{T} stdout P b\n{T} stdout F c\n{T} stdout F d\n"
    ));
    let tail = |lines| LogOptions {
        tail_lines: Some(lines),
        ..LogOptions::default()
    };
    assert_eq!(log.read(tail(1)).await, "d\n");
    assert_eq!(log.read(tail(2)).await, "bc\nd\n");
    assert_eq!(log.read(tail(3)).await, "a\nbc\nd\n");
}

#[tokio::test]
async fn since_and_limit_cut() {
    let log = Log::new(
        "2026-11-20T11:00:00.5Z stdout F old\n2026-11-20T11:00:01.000000000Z stdout F new\n",
    );
    let options = LogOptions {
        since: Some("2026-11-20T11:00:01Z".parse().unwrap()),
        ..LogOptions::default()
    };
    assert_eq!(log.read(options).await, "new\n");
    let options = LogOptions {
        limit_bytes: Some(5),
        ..LogOptions::default()
    };
    assert_eq!(log.read(options).await, "old\nn");
}

#[tokio::test]
async fn a_follower_sees_everything_across_rotation_and_ends_with_the_run() {
    let log = Log::new(&numbered(2));
    let options = LogOptions {
        follow: true,
        tail_lines: Some(1),
        ..LogOptions::default()
    };
    let writer = async {
        tokio::time::sleep(Duration::from_millis(150)).await;
        log.append(&format!("{T} stdout F thr"));
        tokio::time::sleep(Duration::from_millis(150)).await;
        log.append("ee\n");
        fs::rename(
            log.path(),
            log.directory.path().join("0.log.20261128-204500"),
        )
        .unwrap();
        tokio::time::sleep(Duration::from_millis(150)).await;
        log.append(&format!("{T} stdout F four\n"));
        tokio::time::sleep(Duration::from_millis(150)).await;
        log.append(&format!("{T} stdout P five"));
        log.append("\n");
        log.end();
    };
    let (read, ()) = tokio::join!(log.read(options), writer);
    assert_eq!(read, "line 2\nthree\nfour\nfive");
}

#[tokio::test]
async fn a_missing_log_is_an_error_with_its_path() {
    let log = Log::new("");
    let path = log.directory.path().join("none.log");
    let mut stream = Box::pin(stream(&path, &log.run(), LogOptions::default()));
    let error = stream.next().await.unwrap().unwrap_err();
    assert!(error.to_string().contains("none.log"), "{error}");
    assert!(stream.next().await.is_none());
}

proptest! {
    #[test]
    fn any_bytes_are_survived(line in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut out = Vec::new();
        let mut lines = Lines::new(None, true);
        lines.push(&line, &mut out);
        lines.finish(&mut out);
    }

    #[test]
    fn a_containers_bytes_come_back(
        pieces in proptest::collection::vec(("[a-z ]{0,8}", any::<bool>()), 0..20),
    ) {
        let mut written = String::new();
        let mut lines = Lines::new(None, false);
        let mut out = Vec::new();
        for (text, partial) in &pieces {
            let tag = if *partial { "P" } else { "F" };
            lines.push(format!("{T} stdout {tag} {text}").as_bytes(), &mut out);
            written.push_str(text);
            if !partial {
                written.push('\n');
            }
        }
        lines.finish(&mut out);
        prop_assert_eq!(String::from_utf8(out).unwrap(), written);
    }
}
