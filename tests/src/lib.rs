//! (skeleton)

#[cfg(test)]
mod feed;
