//! Memory that the agent does not use goes back to the kernel: what a burst of pods has left in the C
//! allocator, and the program's own pages that only its start or such a burst needed.
//!
//! glibc gives each thread an arena of its own (8 per CPU), and keeps what was freed in them. The
//! agent's blocking calls come and go in dozens of threads: with 253 pods created at once, 74 of 95 MiB
//! of its heap were free memory. So there is one arena, and when the process has grown the free pages in it
//! are given back. Each thread also keeps some hundred freed pieces for itself, between which a page is never
//! all free: with 500 pods that held 34 MiB of heap where 25 do. glibc takes the order to keep none only
//! from its environment, so the agent begins once more with it.
//!
//! Of the program's file all that was ever run or read stays mapped, most of 25 MiB; what an idle agent
//! runs is less. They are unmapped when a burst is over, and once a minute. Unmapped pages stay in the page
//! cache, the next use maps them again (some microseconds for 64 KiB), and the kernel may drop them first
//! when it needs memory.

use std::ffi::{OsStr, OsString};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::unistd::{SysconfVar, sysconf};
use tokio_util::sync::CancellationToken;

/// glibc's settings, `name=value` with colons between them.
const TUNABLES: &str = "GLIBC_TUNABLES";
/// How many freed pieces of each size a thread keeps.
const THREAD_CACHE: &str = "glibc.malloc.tcache_count";

/// An agent on two cores is in its allocator for little of its time.
const ARENA_COUNT: i32 = 1;
/// How often the process is looked at.
pub const INTERVAL: Duration = Duration::from_secs(10);
/// Less growth of the heap than this is not worth looking for free pages.
const HEAP_GROWTH_BYTES: u64 = 1 << 20;
/// Looks after one that found growth in which is trimmed as well: a burst is freed after it has ended.
const TRIMS_AFTER: u32 = 2;
/// Less growth of what is mapped of files than this is not worth mapping it again.
const FILE_GROWTH_BYTES: u64 = 4 << 20;
/// Looks between two times that the program's pages are unmapped.
const LOOKS_MAPPED: u32 = 6;

/// Becomes the same program, with the same arguments and process id, in which threads keep no freed memory.
/// Returns where that is the case already, and with the reason where it cannot be: such an agent is as good,
/// and larger.
pub fn begin_without_thread_caches() -> std::io::Result<()> {
    let Some(tunables) = without_thread_caches(std::env::var_os(TUNABLES)) else {
        return Ok(());
    };
    // By its name: that of the process is taken from it.
    let mut command = Command::new(std::env::current_exe()?);
    let mut arguments = std::env::args_os();
    if let Some(name) = arguments.next() {
        command.arg0(name);
    }
    Err(command.args(arguments).env(TUNABLES, tunables).exec())
}

/// What the environment must say; none where it says how much threads keep, whatever that is.
fn without_thread_caches(tunables: Option<OsString>) -> Option<OsString> {
    if cfg!(not(target_env = "gnu")) {
        return None;
    }
    let mut tunables = tunables.unwrap_or_default();
    if tunables.to_string_lossy().contains(THREAD_CACHE) {
        return None;
    }
    if !tunables.is_empty() {
        tunables.push(":");
    }
    tunables.push(OsStr::new(THREAD_CACHE));
    tunables.push("=0");
    Some(tunables)
}

/// For the beginning of `main`: threads that run already keep their arenas.
pub fn limit_arenas() {
    // SAFETY: integers only; called before other threads exist.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, ARENA_COUNT) };
}

/// Gives pages back whenever the process has grown, until `shutdown`.
pub async fn give_back(interval: Duration, shutdown: CancellationToken) {
    let mut used = Used::default();
    loop {
        tokio::select! {
            // Cancel-safe: a timer, and waiting for the end.
            () = tokio::time::sleep(interval) => {}
            () = shutdown.cancelled() => return,
        }
        let given = used.look(Resident::read());
        if given == Give::default() {
            continue;
        }
        // Milliseconds, with the arena locked.
        let done = tokio::task::spawn_blocking(move || {
            if given.heap {
                // SAFETY: thread-safe by its contract; it touches free chunks only.
                unsafe { libc::malloc_trim(0) };
            }
            if given.file {
                unmap_program();
            }
        });
        let _ = done.await;
        used.given(given, Resident::read());
    }
}

/// What is to be given back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Give {
    heap: bool,
    file: bool,
}

/// What was resident when something was last given back.
#[derive(Clone, Copy, Default)]
struct Used {
    after: Resident,
    trims_left: u32,
    looks_to_unmap: u32,
}

impl Used {
    fn look(&mut self, now: Resident) -> Give {
        let grown = now.heap > self.after.heap + HEAP_GROWTH_BYTES;
        let heap = grown || self.trims_left > 0;
        // The first look that finds no growth after some did.
        let burst_is_over = !grown && self.trims_left == TRIMS_AFTER;
        self.trims_left = match grown {
            true => TRIMS_AFTER,
            false => self.trims_left.saturating_sub(1),
        };
        self.looks_to_unmap = self.looks_to_unmap.saturating_sub(1);
        let file = (self.looks_to_unmap == 0 || burst_is_over)
            && now.file > self.after.file + FILE_GROWTH_BYTES;
        Give { heap, file }
    }

    fn given(&mut self, given: Give, now: Resident) {
        if given.heap {
            self.after.heap = now.heap;
        }
        if given.file {
            self.after.file = now.file;
            self.looks_to_unmap = LOOKS_MAPPED;
        }
    }
}

/// What the kernel counts as this process's, in bytes; zeros when it does not tell: then nothing is given
/// back.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Resident {
    heap: u64,
    /// Pages of files, the program's above all.
    file: u64,
}

impl Resident {
    fn read() -> Self {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
        let page_bytes = sysconf(SysconfVar::PAGE_SIZE).ok().flatten().unwrap_or(0);
        Self::parse(&text, u64::try_from(page_bytes).unwrap_or(0)).unwrap_or_default()
    }

    /// `statm`: size, resident, of that shared with files, ...; in pages.
    fn parse(statm: &str, page_bytes: u64) -> Option<Self> {
        let mut fields = statm.split(' ').skip(1);
        let mut next = || fields.next()?.parse::<u64>().ok()?.checked_mul(page_bytes);
        let (all, file) = (next()?, next()?);
        let heap = all.saturating_sub(file);
        Some(Self { heap, file })
    }
}

/// Unmaps the program's pages that are as its file has them.
fn unmap_program() {
    let Ok(program) = std::fs::read_link("/proc/self/exe") else {
        return;
    };
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap_or_default();
    for (start, end) in unchanged_ranges(&smaps, &program.to_string_lossy()) {
        // SAFETY: a private mapping of a file that nobody may write through and in which no page differs
        // from the file (relocated ones are counted as anonymous): whoever needs a page finds the
        // same bytes in the file, which cannot be changed while it runs.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED) };
    }
}

/// Start and end of the mappings of `program` that are not writable and have no page of their own.
fn unchanged_ranges(smaps: &str, program: &str) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut current = None;
    for line in smaps.lines() {
        if let Some(range) = mapping(line) {
            current = range.filter(|_| line.ends_with(&format!(" {program}")));
        } else if let Some(kib) = line.strip_prefix("Anonymous:")
            && kib.trim() == "0 kB"
        {
            found.extend(current.take());
        }
    }
    found
}

/// The first line of a mapping: its range where it is private and never written; none: another line.
fn mapping(line: &str) -> Option<Option<(usize, usize)>> {
    let mut fields = line.split(' ');
    let (start, end) = fields.next()?.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    let range = (address(start)?, address(end)?);
    let permissions = fields.next()?;
    Some(matches!(permissions, "r-xp" | "r--p").then_some(range))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_freed_goes_back() {
        // Small pieces with a kept one at the end: the allocator alone would keep all of it.
        let pieces: Vec<Vec<u8>> = (0..20_000).map(|_| vec![1; 2_000]).collect();
        let _last = vec![1u8; 2_000];
        let full = Resident::read().heap;
        assert!(full > 40_000_000, "{full}");
        drop(pieces);
        let shutdown = CancellationToken::new();
        let task = tokio::spawn(give_back(Duration::from_millis(50), shutdown.clone()));
        tokio::time::timeout(INTERVAL, async {
            while Resident::read().heap > full - 30_000_000 {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        })
        .await
        .unwrap();
        shutdown.cancel();
        task.await.unwrap();
    }

    #[test]
    fn the_program_runs_on_without_its_pages() {
        let program = std::fs::read_link("/proc/self/exe").unwrap();
        let smaps = || std::fs::read_to_string("/proc/self/smaps").unwrap();
        let ranges = unchanged_ranges(&smaps(), &program.to_string_lossy());
        assert!(!ranges.is_empty());
        // All of it has been read before: what is mapped afterwards is what was needed since.
        let text = std::fs::read(&program).unwrap();
        let before = Resident::read().file;
        unmap_program();
        let after = Resident::read().file;
        assert!(after < before, "{before} {after}");
        assert_eq!(text, std::fs::read(&program).unwrap());
    }

    #[test]
    fn only_unchanged_pages_of_the_program_are_unmapped() {
        let smaps = "\
            1000-2000 r--p 00000000 fe:00 7 /bin/a b\nAnonymous:  0 kB\n\
            2000-5000 r-xp 00001000 fe:00 7 /bin/a b\nRss: 4 kB\nAnonymous:             0 kB\n\
            5000-6000 r--p 00004000 fe:00 7 /bin/a b\nAnonymous:             4 kB\n\
            6000-7000 rw-p 00005000 fe:00 7 /bin/a b\nAnonymous:             0 kB\n\
            7000-8000 r-xp 00000000 fe:00 8 /lib/c.so\nAnonymous:            0 kB\n\
            8000-9000 r--p 00000000 00:00 0 \nAnonymous:             0 kB\n";
        let ranges = unchanged_ranges(smaps, "/bin/a b");
        assert_eq!(ranges, [(0x1000, 0x2000), (0x2000, 0x5000)]);
        assert_eq!(unchanged_ranges("nonsense\n-\n- r--p", "/bin/a b"), []);
    }

    #[test]
    fn a_burst_is_trimmed_until_it_is_over_and_the_program_unmapped_then_and_once_a_minute() {
        let mib = |heap: u64, file: u64| Resident {
            heap: heap << 20,
            file: file << 20,
        };
        let mut used = Used::default();
        let mut look = |before: Resident, after: Resident| {
            let give = used.look(before);
            used.given(give, after);
            (give.heap, give.file)
        };
        assert_eq!(look(mib(20, 24), mib(15, 3)), (true, true));
        assert_eq!(look(mib(40, 24), mib(39, 24)), (true, false), "a burst");
        assert_eq!(look(mib(45, 24), mib(41, 24)), (true, false), "it goes on");
        assert_eq!(look(mib(39, 24), mib(30, 3)), (true, true), "it is over");
        assert_eq!(look(mib(30, 24), mib(28, 24)), (true, false));
        for _ in 0..4 {
            assert_eq!(look(mib(28, 24), mib(28, 24)), (false, false), "idle");
        }
        assert_eq!(look(mib(28, 24), mib(28, 3)), (false, true), "a minute");
        for _ in 0..20 {
            assert_eq!(look(mib(28, 6), mib(28, 6)), (false, false), "little used");
        }
    }

    #[test]
    fn the_environment_is_made_once_and_a_users_word_counts() {
        let ask = |text: &str| without_thread_caches(Some(text.into()));
        let made = without_thread_caches(None).unwrap();
        assert_eq!(made, "glibc.malloc.tcache_count=0");
        assert_eq!(without_thread_caches(Some(made)), None);
        let other = "glibc.malloc.perturb=1";
        let both = "glibc.malloc.perturb=1:glibc.malloc.tcache_count=0";
        assert_eq!(ask(other), Some(both.into()));
        assert_eq!(ask(both), None);
        assert_eq!(ask("glibc.malloc.tcache_count=7"), None);
    }

    #[test]
    fn statm_is_read_in_bytes() {
        let read = Resident::parse("900 300 100 7 0 50 0\n", 4096);
        let (heap, file) = (200 * 4096, 100 * 4096);
        assert_eq!(read, Some(Resident { heap, file }));
        assert_eq!(Resident::parse("", 4096), None);
    }
}
