"""Tests that take long and hold what others hold in part: `make test` leaves them out, `make test-all` and
pytest by itself run them.
"""

LONG = (
    "attention/test_cross_attention.py::test_kernel_compiles_for_hopper",
    "cli/test_cache_folder.py::test_two_processes_share_one_cache",
    "cli/test_launch.py::test_ranks_begin_anew_where_cuda_was_asked_before_the_fork",
    "cli/test_launch.py::test_ranks_end_with_their_launcher_and_listen_to_nobody_else[SIGHUP]",
    "cli/test_launch.py::test_ranks_end_with_their_launcher_and_listen_to_nobody_else[SIGTERM]",
    "cli/test_launch.py::test_the_command_says_what_became_of_a_rank[SIGKILL-1]",
    "cli/test_launch.py::test_the_command_says_what_became_of_a_rank[SIGTERM-1]",
    "cli/test_launch.py::test_the_page_loop_is_right_on_every_rank_under_torchrun",
    "cli/test_reproduce.py::test_two_workers_make_it_again",
    "cli/test_resume.py::test_two_ranks_go_on",
    "evaluation/test_eval_cache.py::test_no_worker_outlives_a_killed_parent",
    "pipelines/test_controlled_video.py::test_both_layouts_hold_the_same_model",
    "pipelines/test_controlled_video.py::test_ranks_make_the_video_of_one[2]",
    "pipelines/test_pipeline_parity.py::test_pipeline_parity[random-tiny-128-128-33-3-5.0]",
    "pipelines/test_time_left.py::test_wan_tiny_keeps_its_promise",
    "reliability/test_crash_points.py",
    "reliability/test_fault_points.py::test_a_fault_at_every_point_costs_one_task_at_most[out of memory]",
    "reliability/test_fault_points.py::test_cancelled_three_times_at_every_point_it_ends_once",
    "reliability/test_fault_points.py::test_ctrl_c_at_every_point_loses_no_step_that_was_done",
    "reliability/test_neighbours.py::test_no_setting_of_one_task_reaches_the_next",
    "reliability/test_neighbours.py::test_nothing_grows_over_many_tasks",
    "reliability/test_strangers_data.py::test_noise_on_every_port_of_a_whole_run",
    "service/test_generated_requests.py::test_many_generated_requests",
    "test_benchmarks.py::test_a_small_run[main---sections,ceilings",
    "test_benchmarks.py::test_gpu_kernels_are_their_twins",
    "test_benchmarks.py::test_scaling_and_its_simulation",
    "test_examples.py::test_step_caches",
    "test_exports.py::test_the_page_can_import",
)
"""How their names begin, below `tests/`."""
