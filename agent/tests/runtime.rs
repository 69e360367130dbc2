//! Real containers through shim, gantry-rt and libcontainer. Needs root, busybox and the built
//! binaries; says `skipped` otherwise. Everything it makes is its own and gone at the end.

#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, reason = "a test reports by panicking")]

#[path = "runtime/fixture.rs"]
mod fixture;

use std::fs;
use std::time::{Duration, Instant, SystemTime};

use fixture::Fixture;
use futures_util::StreamExt;
use gantry_agent::pods::rotation;
use gantry_agent::runtime::logs::files::{self, Limits};
use gantry_agent::runtime::logs::{self, LogOptions};
use gantry_agent::runtime::{ExecSpec, Runtime, RuntimeError, Seccomp};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Runs a test with a fixture and checks that nothing is left.
macro_rules! with_fixture {
    ($fixture:ident, $body:block) => {{
        let Some(mut $fixture) = Fixture::new().await else { return };
        $body
        $fixture.finish().await;
    }};
}

#[tokio::test(flavor = "multi_thread")]
async fn an_exit_code_and_the_output_are_recorded() {
    with_fixture!(fx, {
        let before = SystemTime::now();
        let run = fx
            .run("echo out; echo err >&2; printf end; exit 42", json!({}))
            .await
            .unwrap();
        let exit = fx.exit(&run).await;
        assert_eq!(
            (exit.code, exit.signal, exit.unknown, exit.oom_killed),
            (42, 0, false, false)
        );
        assert!(before <= exit.started_at && exit.started_at <= exit.finished_at);
        let log = fs::read_to_string(fx.log_path(&run)).unwrap();
        assert!(log.contains(" stdout F out\n"), "{log}");
        assert!(log.contains(" stderr F err\n"), "{log}");
        assert!(log.contains(" stdout P end\n"), "{log}");
        // Asked again, it is not started again.
        let again = fx.start_again(&run).await.unwrap();
        assert_eq!(again, exit.started_at);
        assert_eq!(fs::read_to_string(fx.log_path(&run)).unwrap(), log);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_reach_init_and_end_it() {
    with_fixture!(fx, {
        let run = fx.run(
            "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done",
            json!({}),
        );
        let run = run.await.unwrap();
        fx.wait_for_log(&run, "ready").await;
        fx.runtime
            .signal_container(&run, libc::SIGTERM)
            .await
            .unwrap();
        assert_eq!(fx.exit(&run).await.code, 7);
        let run = fx.run("sleep 1000", json!({})).await.unwrap();
        fx.runtime.kill_container(&run).await.unwrap();
        let exit = fx.exit(&run).await;
        assert_eq!((exit.code, exit.signal, exit.oom_killed), (137, 9, false));
        // Gone is fine.
        fx.runtime
            .signal_container(&run, libc::SIGTERM)
            .await
            .unwrap();
        fx.runtime.kill_container(&run).await.unwrap();
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn isolation_is_dockers() {
    with_fixture!(fx, {
        let script = "grep -E 'CapEff|CapBnd|NoNewPrivs|Seccomp:|SigIgn|SigBlk' /proc/self/status; \
            cat /proc/keys /proc/kcore | wc -c; (echo x > /proc/sys/kernel/hostname) 2>&1; \
            unshare -m true 2>&1; cat /proc/1/cmdline | head -c 4; echo; ls /proc/self/fd | wc -l; \
            echo HOME=$HOME PATH=$PATH; pwd";
        for (allow, nnp) in [(true, "0"), (false, "1")] {
            let context = json!({"allowPrivilegeEscalation": allow});
            let patch = json!({"securityContext": context, "workingDir": "/not/there/yet"});
            let run = fx.run(script, patch).await.unwrap();
            assert_eq!(fx.exit(&run).await.code, 0, "{}", fx.text(&run));
            let text = fx.text(&run);
            for wanted in [
                "CapEff:\t00000000a80425fb",
                "CapBnd:\t00000000a80425fb",
                &format!("NoNewPrivs:\t{nnp}"),
                "Seccomp:\t2",
                "SigIgn:\t0000000000000000",
                "SigBlk:\t0000000000000000",
                "Read-only file system",
                "Operation not permitted",
                "HOME=/root PATH=/usr/local/sbin",
                "/not/there/yet",
            ] {
                assert!(text.contains(wanted), "{wanted:?} not in {text}");
            }
            // Masked: both read as nothing.
            assert!(text.lines().any(|l| l == "0"), "{text}");
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn links_of_an_image_lead_no_mount_outside() {
    with_fixture!(fx, {
        let outside = fx.outside();
        for name in ["proc", "sys", "dev"] {
            fx.link_in_image(name, Some(&outside));
            let error = fx.run("true", json!({})).await.unwrap_err().to_string();
            let wanted = format!("mount /{name}: the image has a symbolic link there");
            assert!(error.contains(&wanted), "{error}");
            fx.link_in_image(name, None);
        }
        // The place of a file that the agent brings: the link leads to where it would lead if the
        // image were the whole machine.
        let up =
            std::path::PathBuf::from("../../../../../..").join(outside.strip_prefix("/").unwrap());
        for target in [outside.clone(), up] {
            fx.link_in_image("etc", Some(&target));
            let run = fx.run("cat /etc/hosts", json!({})).await.unwrap();
            assert_eq!(fx.exit(&run).await.code, 0, "{}", fx.text(&run));
            assert_eq!(fx.text(&run), "of the pod\n");
            fx.link_in_image("etc", None);
        }
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 0);
        // None of it has hurt the next one.
        let run = fx.run("cat /etc/hosts", json!({})).await.unwrap();
        assert_eq!(fx.exit(&run).await.code, 0);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_in_the_cgroup_and_oom_is_told() {
    with_fixture!(fx, {
        let resources =
            json!({"requests": {"cpu": "500m"}, "limits": {"cpu": "500m", "memory": "32Mi"}});
        let run = fx
            .run("sleep 1000", json!({"resources": resources}))
            .await
            .unwrap();
        if !gantry_shim::cgroup::is_v2() {
            let read = |controller: &str, file: &str| {
                let path = format!("/sys/fs/cgroup/{controller}{}/{file}", fx.cgroup_of(&run));
                fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
            };
            assert_eq!(read("memory", "memory.limit_in_bytes").trim(), "33554432");
            assert_eq!(
                read("memory", "memory.memsw.limit_in_bytes").trim(),
                "33554432"
            );
            assert_eq!(read("cpu", "cpu.cfs_quota_us").trim(), "50000");
            assert_eq!(read("cpu", "cpu.shares").trim(), "512");
            assert!(read("devices", "devices.list").contains("c 1:3 rwm"));
        }
        fx.runtime.kill_container(&run).await.unwrap();
        assert!(!fx.exit(&run).await.oom_killed);
        let eat = "x=a; while :; do x=$x$x; done";
        let run = fx
            .run(eat, json!({"resources": {"limits": {"memory": "16Mi"}}}))
            .await
            .unwrap();
        let exit = fx.exit(&run).await;
        assert!(exit.oom_killed && exit.code == 137, "{exit:?}");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_program_is_told_in_kubernetes_words_and_leaves_nothing() {
    with_fixture!(fx, {
        for (command, wanted) in [
            (
                "/bin/nope",
                r#"exec: "/bin/nope": stat /bin/nope: no such file or directory"#,
            ),
            (
                "nope",
                r#"exec: "nope": executable file not found in $PATH"#,
            ),
            ("/etc", r#"exec: "/etc": is a directory"#),
        ] {
            let error = fx.start(json!({"command": [command]})).await.unwrap_err();
            match error {
                RuntimeError::Container(text) => assert_eq!(text, wanted),
                other => panic!("{other:?}"),
            }
        }
        let error = fx.start_in_netns("/nowhere/net").await.unwrap_err();
        assert!(matches!(&error, RuntimeError::Container(_)), "{error:?}");
        assert_eq!(fx.observed().await.len(), 0);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_has_streams_an_exit_code_and_the_filter() {
    with_fixture!(fx, {
        for allow in [true, false] {
            let context = json!({"allowPrivilegeEscalation": allow});
            let patch = json!({"securityContext": context});
            let run = fx.run("sleep 1000", patch).await.unwrap();
            let script = "grep -E 'Seccomp:|CapEff|NoNewPrivs' /proc/self/status; cat; \
                          echo err >&2; exit 3";
            let mut session = fx.exec(&run, script, true, false).await.unwrap();
            let mut stdin = session.stdin.take().unwrap();
            stdin.write_all(b"typed\n").await.unwrap();
            drop(stdin);
            let (mut out, mut err) = (String::new(), String::new());
            session.stdout.read_to_string(&mut out).await.unwrap();
            session
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut err)
                .await
                .unwrap();
            assert_eq!(session.exit.await.unwrap().unwrap(), 3);
            assert!(
                out.contains("Seccomp:\t2") && out.contains("00000000a80425fb"),
                "{out}"
            );
            assert!(out.ends_with("typed\n"), "{out}");
            assert_eq!(err, "err\n");
            let missing = ExecSpec {
                run: run.clone(),
                command: vec!["/nope".into()],
                stdin: false,
                tty: false,
            };
            let error = fx.runtime.exec(&missing).await.err().unwrap().to_string();
            assert_eq!(
                error,
                r#"exec: "/nope": stat /nope: no such file or directory"#
            );
            // A failed exec leaves no zombie that would keep init from ending.
            fx.runtime.kill_container(&run).await.unwrap();
            assert_eq!(fx.exit(&run).await.code, 137);
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_a_size_and_an_end() {
    with_fixture!(fx, {
        let run = fx.run("sleep 1000", json!({})).await.unwrap();
        let script = "stty size; read x; stty size; tty; echo got $x; exit 5";
        let mut session = fx.exec(&run, script, true, true).await.unwrap();
        assert!(session.stderr.is_none());
        session.resize.send((100, 40)).await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        session
            .stdin
            .as_mut()
            .unwrap()
            .write_all(b"word\n")
            .await
            .unwrap();
        let mut out = String::new();
        session.stdout.read_to_string(&mut out).await.unwrap();
        assert!(out.contains("40 100") && out.contains("/dev/pts/"), "{out}");
        assert!(out.contains("got word\r\n"), "{out}");
        assert_eq!(session.exit.await.unwrap().unwrap(), 5);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_exec_session_kills_its_command() {
    with_fixture!(fx, {
        let run = fx.run("sleep 1000", json!({})).await.unwrap();
        let session = fx
            .exec(&run, "exec sleep 4321", false, false)
            .await
            .unwrap();
        let end = Instant::now() + Duration::from_secs(5);
        while !fx.has_process(&run, "sleep\x004321") {
            assert!(Instant::now() < end, "the command never ran");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop(session);
        let end = Instant::now() + Duration::from_secs(5);
        while fx.has_process(&run, "sleep\x004321") {
            assert!(Instant::now() < end, "the command survived its session");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn init_with_a_terminal_logs_it() {
    with_fixture!(fx, {
        let patch = json!({"tty": true, "stdin": true});
        let run = fx.run("tty; echo TERM=$TERM; exit 4", patch).await.unwrap();
        assert_eq!(fx.exit(&run).await.code, 4);
        let text = fx.text(&run);
        assert!(
            text.contains("/dev/pts/") && text.contains("TERM=xterm"),
            "{text}"
        );
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attached_client_types_reads_and_ends_stdin_once() {
    with_fixture!(fx, {
        let patch = json!({"stdin": true, "stdinOnce": true});
        let run = fx
            .run("cat; echo bye; echo oops >&2; exit 3", patch)
            .await
            .unwrap();
        let mut session = fx.runtime.attach(&run, true).await.unwrap();
        let mut beside = fx.runtime.attach(&run, false).await.unwrap();
        let mut stdin = session.stdin.take().unwrap();
        stdin.write_all(b"typed\n").await.unwrap();
        drop(stdin);
        for session in [&mut session, &mut beside] {
            let (mut out, mut err) = (String::new(), String::new());
            session.stdout.read_to_string(&mut out).await.unwrap();
            let stderr = session.stderr.as_mut().unwrap();
            stderr.read_to_string(&mut err).await.unwrap();
            assert_eq!((out.as_str(), err.as_str()), ("typed\nbye\n", "oops\n"));
        }
        assert_eq!(session.exit.await.unwrap().unwrap(), 3);
        assert_eq!(fx.exit(&run).await.code, 3);
        assert!(fx.text(&run).contains("typed\nbye\n"), "{}", fx.text(&run));
        assert!(fx.runtime.attach(&run, false).await.is_err());
        let run = fx.run("sleep 1000", json!({})).await.unwrap();
        let Err(error) = fx.runtime.attach(&run, true).await else {
            panic!("stdin without stdin");
        };
        assert!(error.to_string().contains("stdin: true"), "{error}");
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attached_terminal_is_typed_into_and_resized() {
    with_fixture!(fx, {
        let patch = json!({"tty": true, "stdin": true});
        let script = "while read line; do echo got $line; stty size; done";
        let run = fx.run(script, patch).await.unwrap();
        let mut session = fx.runtime.attach(&run, true).await.unwrap();
        session.resize.send((77, 33)).await.unwrap();
        let mut stdin = session.stdin.take().unwrap();
        let mut text = String::new();
        let end = Instant::now() + Duration::from_secs(20);
        // The size is set beside the input: the first answer may still show the old one.
        while !text.contains("33 77") {
            assert!(Instant::now() < end, "{text}");
            stdin.write_all(b"word\n").await.unwrap();
            let mut part = [0; 1024];
            let n = session.stdout.read(&mut part).await.unwrap();
            text.push_str(&String::from_utf8_lossy(&part[..n]));
        }
        assert!(text.contains("got word"), "{text}");
        // The client leaves; the container stays.
        drop((stdin, session));
        let mut session = fx.runtime.attach(&run, true).await.unwrap();
        let mut stdin = session.stdin.take().unwrap();
        stdin.write_all(b"again\n").await.unwrap();
        let mut text = String::new();
        while !text.contains("got again") {
            let mut part = [0; 1024];
            let n = session.stdout.read(&mut part).await.unwrap();
            assert!(n > 0, "{text}");
            text.push_str(&String::from_utf8_lossy(&part[..n]));
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_stops_no_container() {
    with_fixture!(fx, {
        let script = "head -c 3000000 /dev/zero | tr '\\0' x; echo; sleep 1; exit 5";
        let run = fx.run(script, json!({})).await.unwrap();
        let session = fx.runtime.attach(&run, false).await.unwrap();
        assert_eq!(fx.exit(&run).await.code, 5);
        assert!(fx.text(&run).len() >= 3_000_000);
        // It hears that it has not seen everything, whatever it reads now.
        assert!(session.exit.await.unwrap().is_err());
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn no_line_and_no_exit_code_is_lost_when_the_agent_dies() {
    with_fixture!(fx, {
        let script = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); echo line $i; done; exit 9";
        let run = fx.run(script, json!({})).await.unwrap();
        fx.wait_for_log(&run, "line 100").await;
        // The agent's side of everything vanishes, as with SIGKILL.
        fx.drop_agent();
        tokio::time::sleep(Duration::from_millis(300)).await;
        fx.new_agent();
        let observed = fx.observed().await;
        assert_eq!(observed.len(), 1, "{observed:?}");
        let exit = fx.exit(&run).await;
        assert_eq!((exit.code, exit.unknown), (9, false));
        let text = fx.text(&run);
        assert_eq!(text.lines().count(), 100_000);
        for (index, line) in text.lines().enumerate() {
            assert_eq!(line, format!("line {}", index + 1));
        }
        // And when it dies while nothing runs.
        fx.drop_agent();
        fx.new_agent();
        let observed = fx.observed().await;
        assert_eq!(observed[0].exit.as_ref().map(|e| e.code), Some(9));
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_follower_loses_no_line_over_many_rotations() {
    with_fixture!(fx, {
        // Slower than the looks at its log, also where those have to wait for a processor.
        let script = "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); echo line $i; \
                      [ $((i%1000)) -ne 0 ] || sleep 0.2; done";
        let run = fx.run(script, json!({})).await.unwrap();
        fx.wait_for_log(&run, "line 10").await;
        let options = LogOptions {
            follow: true,
            ..LogOptions::default()
        };
        let directory = fx.run_directory(&run);
        let mut follower = Box::pin(logs::stream(&fx.log_path(&run), &directory, options));
        let mut text = follower.next().await.unwrap().unwrap().to_vec();
        // The follower sleeps meanwhile.
        let limits = Limits {
            bytes_max: 10_000,
            file_count_max: 1_000,
        };
        while let Some(container) = fx.runtime.open_logs().pop() {
            rotation::rotate(&fx.runtime, &container, limits)
                .await
                .unwrap();
        }
        while let Some(part) = follower.next().await {
            text.extend_from_slice(&part.unwrap());
        }
        let rotated = files::rotated(&fx.log_path(&run)).unwrap();
        assert!(rotated.len() > 3, "{rotated:?}");
        let want: String = (1..=20_000).map(|i| format!("line {i}\n")).collect();
        assert!(
            text == want.as_bytes(),
            "{} of {} bytes",
            text.len(),
            want.len()
        );
        // The tail is counted over files too, and surplus ones go.
        let options = LogOptions {
            tail_lines: Some(15_000),
            ..LogOptions::default()
        };
        let tail: Vec<_> = logs::stream(&fx.log_path(&run), &directory, options)
            .collect()
            .await;
        let tail: Vec<u8> = tail.into_iter().flat_map(|part| part.unwrap()).collect();
        assert_eq!(tail.split(|&b| b == b'\n').count() - 1, 15_000);
        assert_eq!(
            files::surplus(&rotated, Limits::default()).len(),
            rotated.len() - 4
        );
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_shim_is_replaced_and_its_container_goes_on() {
    with_fixture!(fx, {
        let script =
            "i=0; while [ $i -lt 40 ]; do i=$((i+1)); echo line $i; sleep 0.05; done; exit 6";
        let run = fx.run(script, json!({})).await.unwrap();
        fx.wait_for_log(&run, "line 5").await;
        fx.kill_shim();
        let exit = fx.exit(&run).await;
        // The kernel may not tell a stranger's status: then it says so instead of guessing.
        assert!(
            exit.code == 6 || (exit.unknown && exit.code == 137),
            "{exit:?}"
        );
        eprintln!("after the shim's death the status was {exit:?}");
        let text = fx.text(&run);
        assert_eq!(text.lines().count(), 40, "{text}");
        // The replacement does everything the first one did.
        let run = fx.run("exit 1", json!({})).await.unwrap();
        assert_eq!(fx.exit(&run).await.code, 1);
        // Dead while no agent looks: the next agent's list repairs it.
        let run = fx.run("sleep 1000", json!({})).await.unwrap();
        fx.drop_agent();
        fx.kill_shim();
        fx.new_agent();
        let observed = fx.observed().await;
        let found = observed.iter().find(|c| c.run == run).unwrap();
        assert!(found.exit.is_none() && found.pid.is_some(), "{found:?}");
        fx.runtime
            .signal_container(&run, libc::SIGKILL)
            .await
            .unwrap();
        assert_eq!(fx.exit(&run).await.code, 137);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_container_says_last_is_logged_once_though_its_shim_is_killed_then() {
    with_fixture!(fx, {
        // The end comes within the milliseconds in which there is no shim.
        let script = "echo one; while [ ! -e /end ]; do :; done; echo two; printf three; exit 7";
        for _ in 0..5 {
            let _ = std::fs::remove_file(fx.rootfs().join("end"));
            let run = fx.run(script, json!({})).await.unwrap();
            fx.wait_for_log(&run, "one").await;
            fx.kill_shim();
            std::fs::write(fx.rootfs().join("end"), "").unwrap();
            let exit = fx.exit(&run).await;
            assert!(exit.code == 7 || exit.unknown, "{exit:?}");
            assert_eq!(
                fx.text(&run).lines().collect::<Vec<_>>(),
                ["one", "two", "three"]
            );
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_shim_whose_sandbox_is_gone_ends_by_itself() {
    with_fixture!(fx, {
        let pid = fx.abandon();
        let end = std::time::Instant::now() + Duration::from_secs(20);
        while std::path::Path::new(&format!("/proc/{pid}")).exists() {
            assert!(std::time::Instant::now() < end, "the shim stays");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_was_cut_off_is_as_if_it_had_never_been() {
    with_fixture!(fx, {
        // An agent that died right after its intent, with libcontainer's torn state beside it.
        let run = fx.cut_off_start();
        assert!(fx.observed().await.is_empty());
        assert!(!fx.run_directory(&run).exists());
        let run = fx.cut_off_start();
        fx.start_run(&run, json!({"command": ["true"]}))
            .await
            .unwrap();
        assert_eq!(fx.exit(&run).await.code, 0);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_removal_that_was_cut_off_anywhere_is_finished() {
    with_fixture!(fx, {
        // An agent that died while it removed a run has left any of its files.
        let run = fx.run("exit 3", json!({})).await.unwrap();
        assert_eq!(fx.exit(&run).await.code, 3);
        fs::remove_file(fx.run_directory(&run).join("exit")).unwrap();
        fx.new_agent();
        fx.runtime.remove_container(&run).await.unwrap();
        assert!(!fx.run_directory(&run).exists());
        let run = fx.run("exit 3", json!({})).await.unwrap();
        assert_eq!(fx.exit(&run).await.code, 3);
        fs::remove_file(fx.run_directory(&run).join("started")).unwrap();
        fx.new_agent();
        assert!(fx.observed().await.is_empty());
        assert!(!fx.run_directory(&run).exists());
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn unconfined_and_privileged_have_no_filter() {
    with_fixture!(fx, {
        let script = "grep -E 'Seccomp:|CapEff' /proc/self/status";
        let context = json!({"seccompProfile": {"type": "Unconfined"}});
        let run = fx
            .run(script, json!({"securityContext": context}))
            .await
            .unwrap();
        assert_eq!(fx.exit(&run).await.code, 0);
        assert!(fx.text(&run).contains("Seccomp:\t0"), "{}", fx.text(&run));
        assert!(fx.text(&run).contains("a80425fb"), "{}", fx.text(&run));
        let context = json!({"privileged": true});
        let run = fx
            .run(script, json!({"securityContext": context}))
            .await
            .unwrap();
        assert_eq!(fx.exit(&run).await.code, 0);
        assert!(fx.text(&run).contains("Seccomp:\t0"), "{}", fx.text(&run));
        let context = json!({"runAsUser": 1000, "runAsGroup": 1001});
        let script = "id -u; id -g; grep -E 'Seccomp:|CapEff' /proc/self/status";
        let run = fx
            .run(script, json!({"securityContext": context}))
            .await
            .unwrap();
        assert_eq!(fx.exit(&run).await.code, 0);
        let text = fx.text(&run);
        assert!(
            text.starts_with("1000\n1001\n") && text.contains("Seccomp:\t2"),
            "{text}"
        );
        assert!(text.contains("CapEff:\t0000000000000000"), "{text}");
        assert_eq!(fx.seccomp_of_last(), Seccomp::RuntimeDefault);
    });
}

#[tokio::test(flavor = "multi_thread")]
async fn starting_takes_milliseconds() {
    with_fixture!(fx, {
        let mut times = Vec::new();
        for _ in 0..20 {
            let before = Instant::now();
            let run = fx.start(json!({"command": ["true"]})).await.unwrap();
            times.push(before.elapsed());
            fx.exit(&run).await;
        }
        times.sort();
        eprintln!("start_container p50 {:?}, max {:?}", times[10], times[19]);
    });
}
