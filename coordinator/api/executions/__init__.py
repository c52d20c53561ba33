"""The Build Execution API: builds that are made, then started; logins; live logs."""
